"""Answers found in what a model wrote: numbers, boxes, "the answer is" in two languages.

Plain functions from text to text. None is "no answer found". Where a model writes its thinking down, cut it first
(`without_thinking`).
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

_THINKING = ("<think>", "</think>")
# Signs that mean a minus, and characters of full width that stand in numbers.
_WIDE = {ord(sign): "-" for sign in "−－﹣‒–"} | {
    ord(wide): unicodedata.normalize("NFKC", wide) for wide in "＋．，：％／＝（）［］｛｝＜＞＄"
}
_WIDE |= {ord("０") + digit: str(digit) for digit in range(10)}
_HAN = r"\u3400-\u9fff\uf900-\ufaff"
# Digits with or without separators of thousands, decimals, an exponent; then the same as a denominator. A minus after
# a digit, a letter or a closing bracket is an operation.
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][+-]?\d+\b)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w)\]}}.])-?\$?(?:{_PLAIN})(?:/\d+(?![\d.]))?|(?:{_PLAIN})(?:/\d+(?![\d.]))?")


def plain(text: str) -> str:
    """The text with digits, signs and brackets of full width in their usual form, and one kind of minus."""
    return text.translate(_WIDE)


def without_thinking(text: str, stop: Sequence[str] = ()) -> str:
    """What follows the thinking of a model, cut at the first of the stop strings.

    Stop strings count after the thinking only, as in lm-evaluation-harness 0.4.13 (`models/utils.py`). Thinking that
    does not end leaves nothing.
    """
    before, end, after = text.rpartition(_THINKING[1])
    if end:
        text = after.lstrip()
    elif _THINKING[0] in before + after:
        text = text.partition(_THINKING[0])[0]
    return cut(text, stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]


def last_digits(text: str) -> str | None:
    """The last run of digits: the extraction of the released evaluate_gsm8k.py.

    It loses signs, decimals and separators ("1,234" is 234), and takes no run that begins with a zero ("5.05"), whose
    evaluation as Python fails there.
    """
    runs = re.findall(r"\d+", text)
    return runs[-1] if runs and runs[-1].isascii() and not re.match(r"0+[1-9]", runs[-1]) else None


def numbers(text: str) -> list[str]:
    """All numbers, such as "-3", "1234", "29.00", "3/4", "1.5e3", without currency and separators of thousands."""
    return [found.replace(",", "").replace("$", "") for found in _NUMBER.findall(plain(text).replace("\\$", "$"))]


def last_number(text: str) -> str | None:
    """The last number, with its sign and decimals."""
    found = numbers(text)
    return found[-1] if found else None


def value(number: str) -> Fraction | None:
    """The value of a number of `numbers`, exactly; None where it is no number, or 10 to a power of four digits or more.

    The exact value of an exponent with more digits may fill the memory.
    """
    if re.search(r"[eE][+-]?\d{4}", number):
        return None
    try:
        above, _, below = number.replace(",", "").partition("/")
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def boxed(text: str) -> str | None:
    r"""The content of the last whole \boxed{…} or \fbox{…}, braces within it included."""
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            single = re.match(r"\S+?(?=[\s$.]|$)", rest)
            return single[0] if single else None
        end = _closing(rest)
        if end is not None:
            return rest[1:end].strip()
    return None


def _closing(text: str) -> int | None:
    """Place of the brace that closes the one at the beginning; None where there is none."""
    depth = 0
    for found in re.finditer(r"\\[{}]|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return None


_ANSWER = re.compile(
    r"(?:final answer|answer|result)\s*(?:is|:|=|are|would be|equals)+\s*:?\s*|####\s*"
    r"|(?:最终)?(?:答案|结果)\s*(?:应该是|应为|就是|是|为|:|=)+\s*|(?<![\u3400-\u9fff])答\s*:\s*",
    re.IGNORECASE,
)
# What ends an answer in running text: a line end, a sentence's end (no decimal point), words that start another one.
_END = re.compile(r"\n|[。；;]|\.(?=\s|$)|,?\s+(?:because|since|so that|I hope)\b|，")


def stated(text: str) -> str | None:
    """What stands after the last "the answer is", "####", "答案是" or the like, to the end of its sentence.

    Dollars and stars around it are cut. None where nothing of that kind stands in the text.
    """
    text = plain(text).replace("**", "")
    places = list(_ANSWER.finditer(text))
    for found in reversed(places):
        rest = text[found.end() :]
        if rest.startswith("$") and (close := rest.find("$", 1)) > 0:
            return rest[1:close].strip()
        answer = _END.split(rest, maxsplit=1)[0].strip(" $*")
        if answer:
            return answer
    return None


def mathematical(text: str) -> str | None:
    r"""The answer to a mathematical problem: the last \boxed{…}, else what is stated, else the last number."""
    text = without_thinking(text)
    return boxed(text) or stated(text) or last_number(spaced(text))


def spaced(text: str) -> str:
    """The text with a blank between each Han character and a digit or Latin letter beside it."""
    text = re.sub(rf"(?<=[{_HAN}])(?=[-\w$\\])(?![{_HAN}])", " ", text)
    return re.sub(rf"(?<=[\w$%}}])(?<![{_HAN}])(?=[{_HAN}])", " ", text)
