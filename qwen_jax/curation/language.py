"""Language of a text, by py3langid (Lui and Baldwin, "langid.py", 2012): 139 languages and `zxx`, no language.

The model comes in the wheel.
"""

import functools
import operator
import re
import string
from collections.abc import Mapping, Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# As many characters from the start, the middle and the end: a page may begin with a menu in another language.
_SAMPLE = 400
UNKNOWN = "und"
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
# The model spreads written Chinese, most of all in traditional characters, over Mandarin, Cantonese and Wu.
GROUPS: Mapping[str, Sequence[str]] = {"zh": ("yue", "wuu")}


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str, groups: Mapping[str, Sequence[str]] = GROUPS) -> tuple[str, float]:
    """Language of a text.

    Args:
        text: any text; a long one is judged by its start, middle and end.
        groups: code to the codes whose probabilities are added to its own; empty keeps all languages apart.

    Returns:
        ISO 639 code and its probability in [0, 1]; `und` and 0 for a text without letters.
    """
    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = "\n".join((text[:_SAMPLE], text[middle : middle + _SAMPLE], text[-_SAMPLE:]))
    if not any(character.isalpha() for character in text):
        return UNKNOWN, 0.0
    # The model knows capitals as initials only; the library helps texts without any small letter.
    if _mostly_capitals(text):
        text = text.lower()
    grouped = groups and _IDEOGRAPH.search(text)
    if not grouped:
        code, probability = _identifier().classify(text)
        # Nothing that adds up can come before a language with half of the probability.
        grouped = groups and (probability < 0.5 or any(code == one or code in groups[one] for one in groups))
    if grouped:
        names = {member: name for name, members in groups.items() for member in members}
        sums: dict[str, float] = {}
        for label, one in _identifier().rank(text):
            name = names.get(label, label)
            sums[name] = sums.get(name, 0.0) + one
        code, probability = max(sums.items(), key=lambda pair: pair[1])
    return code, min(1.0, round(float(probability), 4))


def _mostly_capitals(text: str) -> bool:
    if text.isascii():  # the same, at a fourth of the time
        capitals = sum(map(text.count, string.ascii_uppercase))
        return 4 * capitals > len(text) and capitals > sum(map(text.count, string.ascii_lowercase))
    small = text.lower()
    capitals = sum(map(operator.ne, text, small)) if small != text else 0
    return 4 * capitals > len(text) and capitals > sum(map(operator.ne, text, text.upper()))
