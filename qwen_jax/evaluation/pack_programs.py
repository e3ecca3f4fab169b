"""Programs of HumanEvalPack in languages other than Python: solution and test put together as their publisher does.

Source: bigcode-evaluation-harness, `bigcode_eval/tasks/humanevalpack.py`. Behind the tests stands a statement that
writes a mark, so that a program that ends early, with whatever exit code, does not pass.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from qwen_jax.evaluation import code_answers
from qwen_jax.sandbox import Plan, languages

# Names of the publisher's files: names of the sandbox.
NAMES = {"python": "python", "js": "javascript", "java": "java", "go": "go", "cpp": "cpp", "rust": "rust"}
MEMORY_MB = 2048
# What the publisher puts before every Python solution. numpy is no part of the sandbox; no problem uses it.
PYTHON_IMPORTS = """import collections, copy, datetime, functools, hashlib, heapq, itertools
import math, re, statistics, string, sys
from typing import *
from collections import *
"""
_CPP_IMPORTS = """#include<stdlib.h>
#include<algorithm>
#include<cmath>
#include<math.h>
#include<numeric>
#include<stdio.h>
#include<vector>
#include<set>
#include<map>
#include<queue>
#include<stack>
#include<list>
#include<deque>
#if __has_include(<boost/any.hpp>)
#include<boost/any.hpp>
#endif
#include<string>
#include<climits>
#include<cstring>
#include<iostream>
#include<sstream>
#include<fstream>
using namespace std;
"""
_CPP_FOLDERS = ("/usr/include", "/usr/local/include")
_GO_PACKAGES = (
    *("math", "strings", "fmt", "strconv", "time", "bytes", "regexp", "sort", "math/rand", "crypto/md5"),
    *("os", "errors", "unicode"),
)
# The part of github.com/stretchr/testify/assert that the tests use, with its rule for equal values: byte slices by
# content, all else by reflect.DeepEqual. So no module has to be downloaded.
_GO_ASSERT = """package assert

import (
    "bytes"
    "reflect"
)

type testingT interface {
    Errorf(format string, args ...interface{})
}

type Assertions struct {
    t testingT
}

func New(t testingT) *Assertions {
    return &Assertions{t}
}

func (a *Assertions) Equal(expected, actual interface{}, _ ...interface{}) bool {
    left, isLeft := expected.([]byte)
    right, isRight := actual.([]byte)
    same := reflect.DeepEqual(expected, actual)
    if isLeft && isRight && left != nil && right != nil {
        same = bytes.Equal(left, right)
    }
    if !same {
        a.t.Errorf("expected %v, found %v", expected, actual)
    }
    return same
}
"""
_GO_MARK = """package main

import (
    "os"
    "testing"
)

func TestMain(m *testing.M) {
    code := m.Run()
    if code == 0 {
        os.Stdout.WriteString("\\nMARK\\n")
    }
    os.Exit(code)
}
"""
# Crates that every declaration imports and few problems use: empty ones stand in where they are not used.
_RUST_CRATES = {
    "rand": "mod rand { pub trait Rng {} }",
    "regex": "mod regex { pub struct Regex; }",
    "md5": "mod md5 {}",
}
# A failed console.assert only writes a line; here it ends the program.
_JS_ASSERT = """
console.assert = (holds, ...details) => {
  if (!holds) throw new Error(['Assertion failed', ...details].join(' '))
}
"""


def solution(row: Mapping[str, str], language: str, completion: str, *, cut: bool = True) -> str:
    """The program text of a continuation of `row["prompt"]`, or of `row["declaration"]` in the tasks that repair.

    Args:
      completion: what the model wrote after it.
      cut: whether to end it where the function does, as the publisher's evaluation does.
    """
    language = NAMES.get(language, language)
    if cut and language == "python":
        completion = code_answers.cut(completion, "function")
    elif cut:
        completion = code_answers.cut_braces(completion, open_braces=2 if language == "java" else 1)
    return row["prompt"] + completion


def answer(row: Mapping[str, str], language: str, text: str) -> str:
    """The program text of a chat model's answer, in another language than Python.

    The last fenced block that names the function counts, else the last one, with what stands before the function in the
    declaration and is missing in the block: imports and helpers. Text without a block continues the prompt.
    """
    language = NAMES.get(language, language)
    name = re.escape(row["entry_point"])
    found = code_answers.blocks(text)
    if not found:
        return solution(row, language, text)
    code = ([code for code in found if re.search(rf"\b{name}\b", code)] or found)[-1]
    if language == "java":
        code = code.split("public class Main")[0] if "class Solution" in code else f"class Solution {{\n{code}\n}}"
    before = row["declaration"].rstrip().split("\n")[:-1]
    if language == "java":
        before = [line for line in before if line.startswith("import ")]
    elif language == "rust":
        before = []  # `plan` adds what the declaration has and the text lacks
    helper = next((line for line in before if line.rstrip().endswith("{")), None)
    if helper is not None and helper.strip() not in code:
        return "\n".join([*before, code])
    lines = [line for line in before if line.strip() and line.strip() not in code]
    return "\n".join([*([] if helper else lines), code])


def missing_library(row: Mapping[str, str], language: str) -> str | None:
    """The library that a problem itself needs and that is not here, as one line, or None."""
    language = NAMES.get(language, language)
    text = row["declaration"] + row["canonical_solution"] + row["test"]
    if language == "javascript" and "js-md5" in text:
        return "not run: javascript: the package js-md5 is not part of the sandbox"
    for header in re.findall(r"#include\s*<((?:boost|openssl)/[^>]+)>", text):
        if not any((Path(folder) / header).exists() for folder in _CPP_FOLDERS):
            return f"not run: cpp: {header} is not installed"
    if language == "rust":
        body = "\n".join(line for line in text.splitlines() if not line.strip().startswith("use "))
        for crate, uses in (("rand", r"\brand::|\bRng\b"), ("regex", r"\bRegex\b"), ("md5", r"\bmd5::")):
            if re.search(uses, body):
                return f"not run: rust: the crate {crate} is not part of the sandbox"
    return None


def plan(row: Mapping[str, str], language: str, text: str, mark: str, timeout_s: float) -> Plan:
    """The files and commands that compile and run a solution with its tests.

    Args:
      row: of the publisher's file.
      language: name of the sandbox.
      text: solution with prompt or declaration.
      mark: what the program writes last.
      timeout_s: limit of each command.

    Raises:
      LookupError: the toolchain is not installed.
    """
    code = _PROGRAMS[language](row, text, mark)
    unit_test = language in ("go", "rust")
    made = languages.plan(
        code,
        language,
        timeout_s=timeout_s,
        memory_mb=MEMORY_MB,
        compile_timeout_s=max(timeout_s, 30.0),
        unit_test=unit_test,
    )
    if language == "cpp" and "openssl/" in row["declaration"]:
        compiler = dataclasses.replace(made.steps[0], argv=[*(made.steps[0].argv or ()), "-lcrypto"])
        return dataclasses.replace(made, steps=[compiler, *made.steps[1:]])
    if language == "go":
        files = {
            "mark_test.go": _GO_MARK.replace("MARK", mark),
            "../tmp/go/src/github.com/stretchr/testify/assert/assert.go": _GO_ASSERT,
        }
        return dataclasses.replace(made, files={**made.files, **files})
    return made


def reached_end(stdout: str, mark: str) -> bool:
    """Whether a program wrote its mark, which the tests' end alone makes it do."""
    return any(line == mark or (mark in line and line.endswith("... ok")) for line in stdout.splitlines())


def _javascript(row: Mapping[str, str], text: str, mark: str) -> str:
    return f"{text}\n{_JS_ASSERT}\n{row['test']}\n;require('fs').writeSync(1, '\\n{mark}\\n')\n"


def _java(row: Mapping[str, str], text: str, mark: str) -> str:
    text = text.replace("public class Main {\n    }", "").strip()
    test = row["test"].rstrip()
    method_ends = test.rindex("}", 0, test.rindex("}"))
    statement = f'System.out.println("\\n{mark}");\n    '
    return f"{text}\n{test[:method_ends]}{statement}{test[method_ends:]}\n"


def _cpp(row: Mapping[str, str], text: str, mark: str) -> str:
    test = row["test"].rstrip()
    ends = test.rindex("}")
    return f'{_CPP_IMPORTS}{text.split("int main")[0].strip()}\n{test[:ends]}::puts("\\n{mark}");\n{test[ends:]}\n'


def _go(row: Mapping[str, str], text: str, mark: str) -> str:
    """Solution and test in one file; the packages that they use are imported, others are not."""
    body = re.sub(r"^\s*package main\b.*$", "", text, flags=re.MULTILINE)
    body = re.sub(r"^import\s*\([^)]*\)|^import\s+\"[^\"]*\"", "", body, flags=re.MULTILINE)
    code = f"{body}\n{row['test']}\n"
    statements = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.DOTALL)
    used = [name for name in _GO_PACKAGES if re.search(rf"\b{name.rpartition('/')[2]}\.", statements)]
    imports = "".join(f'    "{name}"\n' for name in ["testing", "github.com/stretchr/testify/assert", *used])
    return f"package main\n\nimport (\n{imports})\n{code}"


def _rust(row: Mapping[str, str], text: str, mark: str) -> str:
    lines = [] if "fn main()" in text else ["fn main(){}"]
    for line in row["declaration"].splitlines():
        name = line.strip().split("(")[0]
        if line.strip() not in text and not (name.startswith("fn") and name in text):
            lines.append(line.strip())
    text = "fn main()".join(text.split("fn main()")[:2])
    program = re.sub(r"^\s*use md5;", "", "\n".join([*lines, text]), flags=re.MULTILINE)  # its module is in the file
    crates = "\n".join(_RUST_CRATES.values())
    # libtest runs tests in the order of their names, so this one is the last.
    last = f"#[cfg(test)]\nmod zzz {{\n    #[test]\n    fn {mark}() {{}}\n}}\n"
    return "\n".join([program, crates, row["test"], last])


_PROGRAMS = {"javascript": _javascript, "java": _java, "cpp": _cpp, "go": _go, "rust": _rust}
