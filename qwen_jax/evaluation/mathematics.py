r"""Whether two answers to a mathematical problem are the same as mathematics: 0.5, \frac{1}{2} and 1/2 are.

math-verify 0.9.0 compares expressions; what it leaves open is decided here, before it:

- Order and brackets count where the gold answer has them: (1, 2) is no {1, 2}, [1, 2) no (1, 2). The order of a set, of
  a union or of answers in a row ("1, 3" or "3 and 1") does not.
- Units and currencies may be missing. Where both answers have one that is known, it must be the same.
- Words are compared as words; the library multiplies their letters ("east" is "seat" to it).
- Digits and signs of full width, Chinese units and words around a number are read (the library takes none of them).

A comparison has a time limit, kept by processes (`comparison_processes`), so this may be called from any thread.
"""

import functools
import re

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.comparison_processes import shared

# A longer text is no answer.
_MAX_CHARACTERS = 1000
# Characters and words to LaTeX.
_LATEX = (
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(left|right|big|Big|bigg|Bigg|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\!|(?<=\d)\\,(?=\d{3})", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\{,\}", ","),
    (r"\\lbrace", r"\\{"),
    (r"\\rbrace", r"\\}"),
    (r"\\lbrack", "["),
    (r"\\rbrack", "]"),
    (r"\\(leq|leqslant)(?![a-zA-Z])|≤|<=", r"\\le "),
    (r"\\(geq|geqslant)(?![a-zA-Z])|≥|>=", r"\\ge "),
    (r"½", r"\\frac{1}{2}"),
    (r"[×✕]", r"\\times "),
    (r"·|⋅|\*(?!\*)", r"\\cdot "),
    (r"÷", "/"),
    (r"π|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"∞|(?<![a-zA-Z\\])(infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"∪|(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),
    (r"∈", r"\\in "),
    (r"∅|\\emptyset|\\varnothing", r"\\{\\}"),
    (r"±", r"\\pm "),
    (r"²", "^{2}"),
    (r"³", "^{3}"),
    (r"√\s*\(([^()]*)\)|(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2}"),
    (r"√\s*(\w+)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°(?![CF])", r" degrees"),
    (r"\\%", "%"),
)
_UNITS: dict[str, str] = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre 毫米",
        "cm": "cm centimeter centimetre 厘米",
        "m": "m meter metre 米",
        "km": "km kilometer kilometre 千米 公里",
        "in": "inch inches in",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "mg": "mg milligram 毫克",
        "g": "g gram 克",
        "kg": "kg kilogram 千克 公斤",
        "lb": "lb pound",
        "t": "ton tonne 吨",
        "ml": "ml mL milliliter millilitre 毫升",
        "l": "L liter litre 升",
        "s": "s sec second 秒",
        "min": "min minute 分钟",
        "h": "h hr hour 小时 时",
        "day": "day 天 日",
        "week": "week 周",
        "month": "month 个月 月",
        "year": "year 年 岁",
        "degree": "degree deg 度",
        "radian": "radian rad",
        "dollar": "$ dollar USD 美元",
        "cent": "cent ¢",
        "euro": "€ euro EUR 欧元",
        "pound sterling": "£ GBP 英镑",
        "yuan": "¥ ￥ yuan RMB CNY 元",
        "mph": "mph",
    }.items()
    for name in names.split()
}
_CURRENCY = r"(?:\\?\$|[€£¥￥]|USD|EUR|GBP|RMB|CNY)"
_WORD = re.compile(r"\\?(?:text|mathrm|textbf|textit|mbox|operatorname|textrm|texttt)\s*\{([^{}]*)\}")
# A number and its unit: "5 cm", "24 square units", "8个", "24 cm^2".
_WITH_UNIT = re.compile(
    r"(?P<number>.*?[\d})!%])(?P<blank>\s*)(?P<how>(?:square|cubic|sq\.?|cu\.?)\s|平方|立方)?"
    r"(?P<unit>[A-Za-z][A-Za-z./ ]*|[\u3400-\u9fff]+)(?:\^\{?(?P<power>[23])\}?)?\.?"
)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
# Two bounds of one variable, as an interval is also written.
_BOUNDS = re.compile(r"(?P<low>[^<>]+?)\s*(?P<first><|\\le)\s*[a-zA-Z]\s*(?P<second><|\\le)\s*(?P<high>[^<>]+)")


def same(prediction: str, gold: str, seconds: float = 5.0) -> bool:
    """Whether a prediction is the gold answer.

    Args:
        prediction: as extracted from what a model wrote (`extraction.mathematical`), in LaTeX or plain text.
        gold: as the publisher gives it.
        seconds: of processor time for each comparison of two expressions; what takes longer is wrong, and logged.
    """
    if not prediction or len(prediction) > _MAX_CHARACTERS:
        return False
    try:
        return _same(_latex(prediction), _latex(gold), seconds)
    except RecursionError:  # hundreds of brackets within each other are no answer
        return False


def _same(prediction: str, gold: str, seconds: float) -> bool:
    if not prediction or not gold:
        return False
    if _squeezed(prediction) == _squeezed(gold):
        return True
    if _is_words(gold) or _is_words(prediction):
        return _words(prediction) == _words(gold)
    if (found := _same_structure(prediction, gold, seconds)) is not None:
        return found
    (prediction, unit), (gold, gold_unit) = _split_unit(prediction), _split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    if _squeezed(prediction) == _squeezed(gold):
        return True
    ours, theirs = _value(prediction.rstrip("% ")), _value(gold.rstrip("% "))
    if ours is None or theirs is None:
        return shared.same(prediction, gold, seconds)
    # A sign of per cent may be left out, or written as a hundredth.
    more = (prediction.endswith("%") - gold.endswith("%")) if ours != theirs else 0
    ours, theirs = (ours / 100 if more > 0 else ours), (theirs / 100 if more < 0 else theirs)
    if ours.denominator == theirs.denominator == 1:
        return ours == theirs
    # Six decimals are taken for exact, as in the library: 0.333333 is 1/3.
    return abs(ours - theirs) < 5e-7


def _latex(text: str) -> str:
    """An answer in the LaTeX that the rest of this module and the library read."""
    text = extraction.plain(text).strip()
    if (inside := extraction.boxed(text)) is not None:
        text = inside
    text = re.sub(r"\\\[|\\\]|\\\(|\\\)", " ", text).replace("$$", "$").replace("**", "^").strip().rstrip(".。,，;")
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    # Han characters around a number are its unit, or words; those between two numbers are not touched.
    if re.search(r"[\d\\]", text):
        text = re.sub(r"^[\u3400-\u9fff][\u3400-\u9fff:\s]*(?=[-\d\\$¥(])", "", text)
        text = re.sub(rf"(?<![\d.])({_NUMBER})\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"\s+", " ", text).strip()


def _squeezed(text: str) -> str:
    """Without blanks, dollars and the marks of text."""
    return re.sub(r"\s+|\$", "", _WORD.sub(r"\1", text)).casefold()


def _is_words(text: str) -> bool:
    """Whether an answer is text: words of several letters, Chinese, or one letter of an option."""
    bare = _WORD.sub(r"\1", text).strip().strip("()")
    if re.fullmatch(r"[A-Z]", bare):
        return True
    if re.search(r"[\d\\=<>^_+*/]", bare):
        return False
    whole = _WORD.fullmatch(text.strip())
    return bool(
        whole or re.search(r"[\u3400-\u9fff]|[A-Za-z]{4,}|[A-Z][a-z]{2,}|[a-z] [a-z]{2,}|(?i:^(yes|no)$)", bare)
    )


def _words(text: str) -> str:
    text = re.sub(r"^(the|a|an)\s+", "", _WORD.sub(r"\1", text).strip().strip("()").casefold())
    return re.sub(r"[^\w\u3400-\u9fff]+", "", text)


def _split_unit(text: str) -> tuple[str, str]:
    """An answer without its unit, and the unit's own name, or "" where there is none that is known.

    A per cent sign stays: it is part of the number.
    """
    unit = ""
    if found := re.match(rf"^([-+]?)\s*({_CURRENCY})\s*(?=[\d.(\\])", text):
        unit, text = _UNITS[found[2].lstrip("\\")], found[1] + text[found.end() :]
    text = re.sub(r"\s*(percent|per cent|个百分点)$", "%", text)
    plain = _WORD.sub(r" \1 ", text).strip()
    found = _WITH_UNIT.fullmatch(plain)
    if not found:
        return text, unit
    name = found["unit"].strip(" .")
    power = found["power"] or {"s": "2", "c": "3", "平": "2", "立": "3"}.get((found["how"] or "-")[0], "")
    known = next((_UNITS[form] for form in (name, name.lower(), name.lower().removesuffix("s")) if form in _UNITS), "")
    # Letters right after a number are its variables, unless they are a unit or stand apart as a word.
    if not known and not re.search(r"[\u3400-\u9fff]", name) and (not found["blank"] or len(name) < 3):
        return text, unit
    if known and len(name) == 1 and name.isascii() and not found["blank"]:
        return text, unit
    return found["number"].strip(), (known + power if known else unit)


def _value(text: str):
    """Exact value of a plain number, fraction, mixed number or one with an exponent; else None."""
    text = text.replace(" ", "").replace("\\cdot", "\\times")
    if found := re.fullmatch(rf"({_NUMBER})\\times10\^\{{?([-+]?\d+)\}}?", text):
        text = f"{found[1]}e{found[2]}"
    if found := re.fullmatch(r"(-?)(\d*)\\frac\{(\d+)\}\{(\d+)\}", text):
        part = extraction.value(f"{found[3]}/{found[4]}")
        return None if part is None else (part + int(found[2] or 0)) * (-1 if found[1] else 1)
    if found := re.fullmatch(r"(-?\d+)\.?/(-?\d+)", text):
        return extraction.value(text)
    return extraction.value(text) if re.fullmatch(rf"(?:{_NUMBER})(?:[eE][-+]?\d{{1,3}})?", text) else None


def _same_structure(prediction: str, gold: str, seconds: float) -> bool | None:
    """The verdict on answers of several parts; None: neither has any, so they are compared as expressions."""
    compare = functools.partial(_same, seconds=seconds)
    # "x \in" before an interval, "(x, y) =" before a tuple.
    named = r"^\s*[a-zA-Z]\s*\\in\s*|^\([a-z](,\s*[a-z])+\)\s*="
    prediction, gold = (re.sub(named, "", text).strip() for text in (prediction, gold))
    if re.match(r"[(\[]", gold):
        prediction = _as_interval(prediction)
    if r"\cup" in gold or r"\cup" in prediction:
        return _unordered(prediction.split(r"\cup"), gold.split(r"\cup"), compare)
    ours, theirs = _bracketed(prediction), _bracketed(gold)
    if theirs and len(theirs[1]) > 1:
        if ours is None:
            parts = _row(prediction)
            return theirs[0] == r"\{\}" and len(parts) > 1 and _unordered(parts, theirs[1], compare)
        if ours[0] != theirs[0] or len(ours[1]) != len(theirs[1]):
            return False
        if theirs[0] == r"\{\}":
            return _unordered(ours[1], theirs[1], compare)
        return all(map(compare, ours[1], theirs[1]))
    if ours and len(ours[1]) > 1:
        return ours[0] == r"\{\}" and _unordered(ours[1], _row(gold), compare)
    if theirs and theirs[0] == r"\{\}" or ours and ours[0] == r"\{\}":
        return _unordered(ours[1] if ours else _row(prediction), theirs[1] if theirs else _row(gold), compare)
    rows = _row(prediction), _row(gold)
    if max(map(len, rows)) > 1:
        return _unordered(*rows, compare)
    bases = [re.fullmatch(r"\w+_\{?(\w+)\}?", text) for text in (prediction, gold)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    return None


def _as_interval(text: str) -> str:
    """Bounds such as "2 \\le x < 5" and "x > 3" as an interval; other texts as they are."""
    if found := _BOUNDS.fullmatch(text):
        sides = ("[" if "le" in found["first"] else "("), ("]" if "le" in found["second"] else ")")
        return f"{sides[0]}{found['low']}, {found['high']}{sides[1]}"
    if found := re.fullmatch(r"[a-zA-Z]\s*(<|>|\\le|\\ge)\s*([^<>,]+)", text):
        closed = found[1].startswith("\\")
        if found[1] in (">", r"\ge"):
            return f"{'[' if closed else '('}{found[2]}, \\infty)"
        return f"(-\\infty, {found[2]}{']' if closed else ')'}"
    return text


def _bracketed(text: str) -> tuple[str, list[str]] | None:
    """The outer brackets of an answer and the parts between them, or None where nothing encloses it as a whole."""
    for opening, closings in ((r"\{", (r"\}",)), ("(", ")]"), ("[", "])")):
        for closing in closings:
            if text.startswith(opening) and text.endswith(closing):
                inside = text[len(opening) : -len(closing)]
                if _depth_stays(inside):
                    return opening + closing, _parts(inside, bracketed=True)
    return None


def _depth_stays(text: str) -> bool:
    """Whether no bracket of the text closes one that stands before it."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _row(text: str) -> list[str]:
    r"""Answers that stand in a row, with commas or "and" between them; a \pm b is two of them."""
    text = re.sub(r",?\s*(?:\\text\s*\{\s*)?\b(?:and|or)\b\s*\}?|[；;、]|和|或", ",", text)
    parts = _parts(text, bracketed=False)
    return [
        part.replace(r"\pm", sign)
        for part in parts
        for sign in (("+", "-") if part.count(r"\pm") == 1 and r"\mp" not in part else ("",))
    ]


def _parts(text: str, *, bracketed: bool) -> list[str]:
    """The text cut at its commas outside of brackets that separate no thousands.

    Within brackets "(1,234)" has two parts; "(1,234, 5)" has 1,234 and 5, since other commas have a blank.
    """
    thousands = r"(?<=\d),(?=\d{3}(?!\d))" if not bracketed or ", " in text else r"(?!)"
    marked = re.sub(
        rf"(?<![\d,])\d{{1,3}}(?:{thousands}\d{{3}})+(?!\d)", lambda found: found[0].replace(",", "\0"), text
    )
    parts, depth, start = [], 0, 0
    for place, character in enumerate(marked):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(marked[start:place])
            start = place + 1
    return [part.replace("\0", ",").strip() for part in [*parts, marked[start:]] if part.strip()]


def _unordered(ours: list[str], theirs: list[str], compare) -> bool:
    """Whether each part of one has its own equal in the other."""
    left = [part.strip() for part in ours]
    if len(left) != len(theirs):
        return False
    for part in theirs:
        found = next((index for index, one in enumerate(left) if compare(one, part.strip())), None)
        if found is None:
            return False
        left.pop(found)
    return True
