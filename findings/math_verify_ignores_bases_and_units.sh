#!/usr/bin/env bash
# math-verify calls answers equal that differ in number base, in unit, or by a factor of 100.
#
# One expects: verify() says whether two answers are the same mathematics.
# What happens (version 0.9.0): the subscript of a base is dropped, so 1010_2 equals 1010 and 12_8 equals 12_9; units are
#   dropped, so 5 cm equals 5 m and 3 hours equal 3 minutes; 50% equals 0.5 and 50 alike; 1e2 in plain text is read as 1
#   and does not equal 100.
# Who suffers: scores on MATH (base conversion is a theme of its number theory, percentages and units of its prealgebra)
#   come out too high, and rewards computed so teach a policy to leave the conversion out.
# qwen_jax: before `evaluation/mathematics.py` asks math-verify, it refuses bases and units that differ and reads numbers
#   with exponents. One that is missing in an answer is accepted, as is per cent, since MATH leaves them out itself.
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
# (gold, answer, what verify says, what a teacher says)
pairs = [
    ("$1010_2$", "$1010$", True, False),
    ("$12_8$", "$12_9$", True, False),
    ("$5\\text{ cm}$", "$5\\text{ m}$", True, False),
    ("$50\\%$", "$50$", True, False),
    ("$50\\%$", "$0.5$", True, True),
    ("$3\\text{ hours}$", "$3\\text{ minutes}$", True, False),
    ("$1234$", "1,234", True, True),
    ("$100$", "1e2", False, True),
]
changed = []
for gold, answer, expected, right in pairs:
    found = verify(parse(gold), parse(answer))
    print(f"gold {gold:18} answer {answer:20} verify says {found!s:6} a teacher {right}")
    if found != expected:
        changed.append((gold, answer))
assert not changed, f"verify now says otherwise of {changed}"
wrong = sum(said != right for _, _, said, right in pairs)
print(f"as described: of {len(pairs)} pairs, {wrong} are judged wrongly")
PYTHON
