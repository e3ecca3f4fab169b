"""Benchmarks whose answers are programs, judged in the sandbox."""

import functools
from pathlib import Path

from qwen_jax import sandbox
from qwen_jax.evaluation import pack_programs
from qwen_jax.evaluation.benchmark import Example
from tests.evaluation.published import Published, write_json_lines

PYTHON = {
    "prompt": 'def inc(n: int) -> int:\n    """ Next number. """\n',
    "declaration": "def inc(n: int) -> int:\n",
    "canonical_solution": "    return n + 1\n",
    "test": "\n\n\ndef check(inc):\n    assert inc(1) == 2\n\ncheck(inc)",
    "entry_point": "inc",
}
PACKS = {
    "python": PYTHON,
    "js": {
        "prompt": "/* Next number. */\nconst inc = (n) => {\n",
        "declaration": "\nconst inc = (n) => {\n",
        "canonical_solution": "  return n + 1\n}\n\n",
        "test": "const testInc = () => {\n  console.assert(inc(1) === 2)\n}\n\ntestInc()\n",
        "entry_point": "inc",
    },
    "java": {
        "prompt": "import java.util.*;\n\nclass Solution {\n    /** Next number. */\n    public int inc(int n) {\n",
        "declaration": "import java.util.*;\n\nclass Solution {\n    public int inc(int n) {\n",
        "canonical_solution": "        return n + 1;\n    }\n}",
        "test": "public class Main {\n    public static void main(String[] args) {\n"
        "        Solution s = new Solution();\n        if (s.inc(1) != 2) {\n"
        "            throw new AssertionError();\n        }\n    }\n}\n",
        "entry_point": "inc",
    },
    "go": {
        "prompt": 'import (\n    "strings"\n)\n\n// Next number.\nfunc Inc(n int) int {\n',
        "declaration": "\nfunc Inc(n int) int {\n",
        "canonical_solution": '    return n + len(strings.Repeat("x", 1))\n}\n\n',
        "test": "func TestInc(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(2, Inc(1))\n}\n",
        "entry_point": "Inc",
    },
    "cpp": {
        "prompt": "/*\nNext number.\n*/\n#include<stdio.h>\nusing namespace std;\nint inc(int n){\n",
        "declaration": "#include<stdio.h>\nusing namespace std;\n#include<math.h>\nint inc(int n){\n",
        "canonical_solution": "    return n + 1;\n}\n\n",
        "test": "#undef NDEBUG\n#include<assert.h>\nint main(){\n    assert (inc(1) == 2);\n}\n",
        "entry_point": "inc",
    },
    "rust": {
        "prompt": "fn main(){}\n\nuse std::cmp::max;\n\n/*\n Next number.\n*/\nfn inc(n: i32) -> i32{\n",
        "declaration": "\nuse std::cmp::max;\n\nfn inc(n: i32) -> i32{\n",
        "canonical_solution": "    return n + 1;\n}\n",
        "test": "\n#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn test_inc() {\n"
        "        assert_eq!(inc(1), 2);\n    }\n\n}\n",
        "entry_point": "inc",
    },
}


@functools.cache
def no_sandbox() -> str | None:
    """Why this system cannot isolate programs, or None."""
    try:
        sandbox.run("")
    except sandbox.SandboxUnavailableError as error:
        return str(error)
    return None


def no_toolchain(language: str) -> str | None:
    """Why programs of this language cannot be judged, or None."""
    found = sandbox.toolchain(pack_programs.NAMES[language])
    return no_sandbox() or (found if isinstance(found, str) else None)


def humaneval(folder: Path) -> None:
    test = "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n"
    rows = [PYTHON | {"task_id": f"HumanEval/{n}", "test": test} for n in range(2)]
    write_json_lines(folder / "HumanEval.jsonl", rows)


def mbpp(folder: Path) -> None:
    def row(n: int) -> dict:
        return {
            "text": f"Write a function to add {n}.",
            "code": f"def add(a):\r\n  return a + {n}",
            "task_id": n,
            "test_setup_code": "",
            "test_list": [f"assert add({a}) == {a + n}" for a in range(3)],
            "challenge_test_list": [],
        }

    write_json_lines(folder / "mbpp.jsonl", map(row, (1, 2, 3, 4, 5, 11, 510, 511)))


def humanevalpack(language: str, folder: Path) -> None:
    row = PACKS[language] | {"task_id": f"{language}/0", "instruction": "Write a function `inc`.", "docstring": ""}
    write_json_lines(folder / f"{language}.jsonl", [row])


def wrong(example: Example) -> str:
    """A program with another number than the right one."""
    return example.target.replace("1", "3").replace("+", "-")


FILES = {
    "humaneval": Published(
        write=humaneval,
        examples=2,
        shot="def inc",
        file="HumanEval.jsonl",
        wrong=('"entry_point"', '"name"'),
        false=wrong,
        data=(164, 0),
        missing=no_sandbox,
    ),
    "mbpp": Published(
        write=mbpp,
        examples=2,
        left_out=6,
        shot="You are an expert Python programmer",
        file="mbpp.jsonl",
        wrong=('"test_list"', '"tests"'),
        right=lambda example: f"{example.target}\n[DONE]",
        false=wrong,
        missing=no_sandbox,
    ),
} | {
    f"humanevalpack_{language}": Published(
        write=functools.partial(humanevalpack, language),
        examples=1,
        shot=PACKS[language]["declaration"].rstrip().split("\n")[-1].strip(),
        file=f"{language}.jsonl",
        wrong=('"test"', '"tests"'),
        right=lambda example: f"\n{example.target}\nmore",
        false=lambda example: f"\n{wrong(example)}",
        data=164,
        missing=functools.partial(no_toolchain, language),
        slow=language not in ("python", "js"),
    )
    for language in PACKS
}
