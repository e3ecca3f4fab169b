"""The program in what a model wrote: the answer of a chat model, or the continuation of a prompt by a base model."""

import ast
import importlib.util
import re
import textwrap

# How the code is found in an answer. "block": the fenced block that defines the function, whole. "released": the three
# regular expressions of QwenLM/Qwen's eval/evaluate_chat_humaneval.py, which keep the function's body only. "evalplus":
# `evalplus.sanitize`, where that package is installed: for comparison, since it drops decorators, dataclasses and
# imports under `try`, and prefers the longest text that parses.
RULES = ("block", "released") + (("evalplus",) if importlib.util.find_spec("evalplus") else ())
# Where a base model's continuation ends. "released": as QwenLM/Qwen's eval/evaluate_humaneval.py cuts it. "function":
# before the first line that does not belong to the function's body.
CUTS = ("released", "function")

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_INLINE = re.compile(r"```(?:[Pp]ython\b)?[ \t]*(\S[^\n]*?)```")
_BEGINS_CODE = re.compile(r"(?:import |from |@|def |async def |class |try:|[A-Za-z_]\w*\s*(?::[^=]+)?=)")


def extract(answer: str, entry_point: str, rule: str = "block") -> str | None:
    """The code of an answer that defines a Python function.

    With "block", the last fenced block that defines the function, after other blocks that define what it uses, or text
    outside of fences where no block does. Imports (also under `try`), decorators, classes, helpers and constants stay;
    calls, assertions, and what runs only as `__main__` are left out, since they are examples of use. Of two definitions
    in one block the last one counts.

    Args:
      answer: what the model said.
      entry_point: name of the function.
      rule: one of `RULES`.

    Returns:
      the module's text with "block" and "evalplus", the function's body with "released" (rule E9), or None if nothing
      defines the function.

    Raises:
      ValueError: an unknown rule, or one whose package is not installed.
    """
    if rule not in RULES:
        raise ValueError(f"rule: {rule!r}: expected one of {', '.join(RULES)}")
    if rule == "released":
        return _released(answer, entry_point)
    if rule == "evalplus":
        # Optional, and in no extra.
        from evalplus.sanitize import sanitize  # ty: ignore[import-not-found]

        return sanitize(answer, entry_point)
    candidates = _candidates(answer)
    found = [code for code in candidates if _defines(code, entry_point)]
    if found:
        return _with_helpers(found[-1], [code for code in candidates if code not in found])
    return _from_text(answer, entry_point)


def blocks(answer: str, language: str | None = None) -> list[str]:
    """The fenced blocks of an answer in order; one that is never closed ends with the answer.

    Args:
      language: only blocks that name this language or none.
    """
    found, begin, fence, name = [], 0, None, ""
    for match in _FENCE.finditer(answer):
        if fence is None:
            fence, name, begin = match.group(1), match.group(2).lower(), match.end() + 1
        elif match.group(1).startswith(fence) and not match.group(2):
            found.append((name, textwrap.dedent(answer[begin : match.start()])))
            fence = None
    if fence is not None:
        found.append((name, textwrap.dedent(answer[begin:])))
    return [code for name, code in found if language is None or name in ("", language)]


def cut(completion: str, rule: str = "released") -> str:
    """A base model's continuation of a HumanEval prompt, up to its end.

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in CUTS:
        raise ValueError(f"rule: {rule!r}: expected one of {', '.join(CUTS)}")
    completion = completion.split("<|endoftext|>")[0]
    if rule == "released":
        return completion.split("\n\n")[0].split("def ")[0]
    lines = completion.split("\n")
    for i, line in enumerate(lines[1:], 1):
        if line.strip() and line[0] not in " \t":
            return "\n".join(lines[:i])
    return completion


def cut_braces(completion: str, open_braces: int) -> str:
    """A continuation in a language with braces, up to the one that closes the function (bigcode-evaluation-harness).

    Args:
      completion: text after the declaration.
      open_braces: how many braces the declaration leaves open: 2 in Java, 1 in the others of HumanEvalPack.
    """
    completion = completion.split("<|endoftext|>")[0]
    for i, character in enumerate(completion):
        open_braces += (character == "{") - (character == "}")
        if open_braces == 0:
            return completion[: i + 1]
    return completion


def _candidates(answer: str) -> list[str]:
    """Modules of the fenced blocks, without examples of use."""
    found = blocks(answer) or _INLINE.findall(answer)
    return [module for code in found if (module := _without_examples(code)) is not None]


def _without_examples(code: str) -> str | None:
    """A module without what would run when it is imported, or None where it is no Python."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    kept = [node for node in tree.body if not _is_example(node)]
    if len(kept) == len(tree.body):
        return code
    lines = code.split("\n")
    # Whole lines, so that comments and formatting stay; two statements on one line are written anew.
    spans = [_span(node) for node in tree.body]
    if any(last >= begin for (_, last), (begin, _) in zip(spans, spans[1:], strict=False)):
        try:
            return ast.unparse(ast.Module(kept, []))
        except RecursionError:  # it goes less deep than the parser: a sum of hundreds of numbers is enough
            return None
    left_out = {line for node in tree.body if _is_example(node) for line in range(_span(node)[0], _span(node)[1] + 1)}
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in left_out)


def _span(node: ast.stmt) -> tuple[int, int]:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(one.lineno for one in decorators)]), node.end_lineno or node.lineno


def _is_example(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test))
    return False


def _with_helpers(code: str, others: list[str]) -> str:
    """The code behind those of the other blocks that define names which it uses and does not define."""
    parts, defined, used = [code], *_names(code)
    for other in reversed(others):
        their_defined, their_used = _names(other)
        if their_defined & (used - defined):
            parts.insert(0, other)
            defined, used = defined | their_defined, used | their_used
    return "\n\n\n".join(parts)


def _names(code: str) -> tuple[set[str], set[str]]:
    """Names that the top level of a module defines, and names that it uses anywhere."""
    tree = ast.parse(code)
    defined = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in ast.walk(ast.Module([node for node in tree.body if not hasattr(node, "name")], [])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return defined, used


def _defines(code: str, name: str) -> bool:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return True
    return False


def _from_text(answer: str, entry_point: str) -> str | None:
    """The code in an answer without usable fences: from a line that begins code, as far as it is Python."""
    lines = [line for line in answer.split("\n") if not _FENCE.match(line)]
    starts = [i for i, line in enumerate(lines) if _BEGINS_CODE.match(line)]
    for start in starts:
        end = len(lines)
        while end > start:
            text = "\n".join(lines[start:end])
            module = _without_examples(text)
            if module is not None:
                if _defines(module, entry_point):
                    return module
                break
            end = _before_error(lines, start, end)
    return None


def _before_error(lines: list[str], start: int, end: int) -> int:
    """A smaller end of the text, at or before the line at which Python stops reading."""
    try:
        ast.parse("\n".join(lines[start:end]))
    except SyntaxError as error:
        at = start + (error.lineno or 1) - 1
        return min(end - 1, max(at, start))
    except (ValueError, RecursionError, MemoryError):
        pass
    return end - 1


def _released(answer: str, entry_point: str) -> str:
    name = re.escape(entry_point)
    to_outer_line = r"(.*?)(?:\n(?!\n*(?:  |\t))|$)"
    patterns = (
        rf"```(?:[Pp]ython\n)?.*?def\s+{name}.*?:\n(.*?)\n```",
        rf"def\s+{name}.*?:\n{to_outer_line}",
        rf"def.*?:\n{to_outer_line}",
    )
    for pattern in patterns:
        if found := re.search(pattern, answer, re.DOTALL):
            return found.group(1)
    return textwrap.indent(answer, " " * 4)
