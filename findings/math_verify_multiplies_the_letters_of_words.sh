#!/usr/bin/env bash
# math-verify calls two words equal that have the same letters: "east" equals "seat", "left" equals "felt".
#
# One expects: an answer that is a word equals that word, or nothing.
# What happens (version 0.9.0): outside of \text, a word between dollars is read as the product of its letters, and
#   products commute. Letters such as "do" are taken for a differential, so "dog" and "god" differ.
# Who suffers: scores and rewards on problems whose answer is a word (directions, days, names, "even" and "odd").
# qwen_jax: `evaluation/mathematics.py` compares words as words and hands the library none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'math-verify==0.9.0' 'latex2sympy2-extended==1.11.0' 'antlr4-python3-runtime==4.11.0' 'sympy==1.14.0'
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from math_verify import parse, verify

print(f"math-verify {importlib.metadata.version('math-verify')}")


def same(gold, answer):
    found = verify(parse(f"${gold}$"), parse(f"${answer}$"))
    print(f"{gold} and {answer}: {'equal' if found else 'different'}")
    return found


assert same("east", "seat") and same("left", "felt") and same("Monday", "dayMon"), "words are compared as words now"
assert not same("east", "west") and not same("dog", "god")
assert not same(r"\text{left}", r"\text{felt}") and same(r"\text{left}", r"\text{left}")
print("as described: words with the same letters are equal")
PYTHON
