#!/usr/bin/env bash
# math-verify makes one set of all \boxed answers of a reply that stand close together: a model that corrects itself
# ("\boxed{3}. Wait, \boxed{4}") is scored wrong for 4, and one that lists its guesses is right when the gold is a pair.
#
# One expects: the last \boxed is the answer, as in the graders of MATH, prm800k and the released evaluations.
# What happens (version 0.9.0): neighbors are joined with a comma and parsed as {3, 4}. With more text between them
#   only the last one counts, so the verdict depends on how many characters the model puts in between.
# Who suffers: scores of models that think aloud; rewards for such replies; "two answers: \boxed{1} and \boxed{2}"
#   equals (1, 2), {2, 1} and "1, 2".
# qwen_jax: has no mathematics scorer yet. The extraction must cut the reply to its last \boxed itself and hand
#   math-verify that alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'math-verify==0.9.0' 'latex2sympy2-extended==1.11.0' 'antlr4-python3-runtime==4.13.2' 'sympy==1.14.0'
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from math_verify import parse, verify

print("math-verify", importlib.metadata.version("math-verify"))
corrected = "The answer is \\boxed{3}. Wait, \\boxed{4}"
apart = "The answer is \\boxed{3}. Wait, " + "I should check that sum again before I say so. " * 3 + "So it is \\boxed{4}"
guesses = "It may be \\boxed{1} or \\boxed{2}"
verdicts = {}
for name, gold, reply in (
    ("corrected at once", "$4$", corrected),
    ("corrected after three sentences", "$4$", apart),
    ("two guesses, gold is a pair", "$(1,2)$", guesses),
    ("two guesses, gold is the last", "$2$", guesses),
):
    verdicts[name] = verify(parse(gold), parse(reply))
    print(f"{name}: gold {gold}, read as {parse(reply)[:1]}, verify says {verdicts[name]}")
expected = [False, True, True, False]
assert list(verdicts.values()) == expected, f"verify now says otherwise: {verdicts}"
print("as described: the last \\boxed is not what counts")
PYTHON
