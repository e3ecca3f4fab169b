"""Sums and differences of whole numbers with their working, one digit after the other from the right.

47+38=    7+8=15, 4+3+1=8: 85
52-38=    12-8=4, 4-3=1: 14
38-52=    12-8=4, 4-3=1: -14
"""

import itertools
import re

_QUESTION = re.compile(r"(\d+)([+-])(\d+)=")


def worked(question: str) -> str:
    """The working, and after a colon the answer, which is the last number of the text.

    Args:
      question: "47+38=" or "52-38=", of whole numbers without a sign.

    Raises:
      ValueError: it is something else.
    """
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise ValueError(f"{question!r} is no sum or difference of two whole numbers without a sign")
    first, second = int(match[1]), int(match[3])
    if match[2] == "+":
        return f"{', '.join(_added(first, second))}: {first + second}"
    return f"{', '.join(_subtracted(max(first, second), min(first, second)))}: {first - second}"


def _digits(first: int, second: int) -> list[tuple[int, int]]:
    """Pairs of digits of two numbers, from the right; the shorter one is filled with zeros."""
    reverse = ([int(digit) for digit in reversed(str(number))] for number in (first, second))
    return list(itertools.zip_longest(*reverse, fillvalue=0))


def _added(first: int, second: int) -> list[str]:
    steps, carry = [], 0
    for one, other in _digits(first, second):
        total = one + other + carry
        steps.append(f"{one}+{other}{'+1' if carry else ''}={total}")
        carry = total // 10
    return steps


def _subtracted(larger: int, smaller: int) -> list[str]:
    steps, borrowed = [], 0
    for one, other in _digits(larger, smaller):
        one -= borrowed
        borrowed = int(one < other)
        one += 10 * borrowed
        steps.append(f"{one}-{other}={one - other}")
    return steps
