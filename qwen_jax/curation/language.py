"""Which language a text is in, by py3langid (Lui and Baldwin, "langid.py", 2012): 139 languages and `zxx`, no language.

The model comes in the wheel.
"""

import functools
from collections.abc import Mapping, Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# As many characters from the start, the middle and the end: a page may begin with a menu in another language.
_SAMPLE = 400
UNKNOWN = "und"
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
    if sum(map(str.isupper, text)) > sum(map(str.islower, text)):
        text = text.lower()
    ranked = _identifier().rank(text)
    code, probability = ranked[0]
    for name, members in groups.items():
        if code == name or code in members:
            code = name
            probability = sum(one for label, one in ranked if label == name or label in members)
    return code, min(1.0, round(float(probability), 4))
