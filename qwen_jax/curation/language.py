"""Which language a text is in, by py3langid (Lui and Baldwin, "langid.py", 2012): 97 languages, model in the wheel."""

import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# As many characters from the start, the middle and the end: a page may begin with a menu in another language.
_SAMPLE = 400
UNKNOWN = "und"


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """ISO 639-1 code and its probability in [0, 1]; `und` and 0 for a text without letters."""
    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = "\n".join((text[:_SAMPLE], text[middle : middle + _SAMPLE], text[-_SAMPLE:]))
    if not any(character.isalpha() for character in text):
        return UNKNOWN, 0.0
    code, probability = _identifier().classify(text)
    return code, round(float(probability), 4)
