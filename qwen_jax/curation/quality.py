"""Rules that drop low-quality pages (report section 2.1): statistics of a text, and thresholds for each language.

The statistics are those of Rae et al., "Scaling Language Models" (Gopher, 2021), appendix A.1. Chinese and other
scripts without spaces are counted in characters: a word is a token of `normalize`.
"""

import collections
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping

import numpy as np

from qwen_jax.curation import normalize

_TERMINAL = tuple(".!?…\"'”’»。！？；」』）)")
_ELLIPSIS = ("...", "…", "⋯")
_BULLETS = tuple("•-*·●▪►■◆")
_MARKUP = frozenset("#{}<>|\\^~=+_[]")
_WORD = re.compile(r"\w+")
# Flags of a character.
_LETTER_OR_DIGIT, _LETTER, _DIGIT, _SYMBOL, _SPACE = (1 << bit for bit in range(5))
STOP_WORDS: Mapping[str, frozenset[str]] = {
    "en": frozenset("the be to of and that have with a in is for it on as was are this by from at or an".split()),
    "zh": frozenset("的 是 在 了 和 有 不 这 我 他 也 就 都 而 与 为 一 人 上 中".split()),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Thresholds; a page must lie within all of them. None turns one off. Shares are in [0, 1].

    Attributes:
        min_tokens, max_tokens: words, or characters of scripts without spaces.
        min_mean_token_length, max_mean_token_length: in characters.
        max_symbol_share: of characters that are marks of programs and mark-up, `#{}<>|\\^~=+_[]`, or symbols.
        max_digit_share: of characters.
        min_letter_share: of tokens with a letter, among all that is not white space between white space or ideographs.
        min_terminal_share: of lines that end in terminal punctuation.
        max_ellipsis_share: of lines that end in an ellipsis.
        max_bullet_share: of lines that begin with a bullet.
        max_duplicate_line_share, max_duplicate_line_characters: of lines that occurred before; of characters in them.
        max_top_2gram, max_top_3gram, max_top_4gram: share of tokens in the most frequent n-gram.
        max_duplicate_5gram, max_duplicate_10gram: share of n-grams that occurred before.
        min_stop_words: different ones of `STOP_WORDS[language]`; languages without a list pass.
    """

    min_tokens: int | None = 50
    max_tokens: int | None = 100_000
    min_mean_token_length: float | None = 3
    max_mean_token_length: float | None = 10
    max_symbol_share: float | None = 0.1
    max_digit_share: float | None = 0.2
    min_letter_share: float | None = 0.7
    min_terminal_share: float | None = 0.1
    max_ellipsis_share: float | None = 0.3
    max_bullet_share: float | None = 0.9
    max_duplicate_line_share: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_top_2gram: float | None = 0.2
    max_top_3gram: float | None = 0.18
    max_top_4gram: float | None = 0.16
    max_duplicate_5gram: float | None = 0.15
    max_duplicate_10gram: float | None = 0.1
    min_stop_words: int | None = 2

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """Statistic to its smallest and largest allowed value."""
        found: dict[str, list] = {}
        for field in dataclasses.fields(self):
            side, _, statistic = field.name.partition("_")
            found.setdefault(statistic, [None, None])[side == "max"] = getattr(self, field.name)
        return {name: (low, high) for name, (low, high) in found.items()}

    def broken(self, values: Mapping[str, float]) -> str | None:
        """The first rule that the statistics break, such as `min_tokens`, or None."""
        for field in dataclasses.fields(self):
            side, _, statistic = field.name.partition("_")
            bound, value = getattr(self, field.name), values.get(statistic)
            if bound is not None and value is not None and (value < bound if side == "min" else value > bound):
                return field.name
        return None


# A character of Chinese is a token, so tokens have length 1, stop "words" are characters, and five tokens in a row are
# but three words, which good text repeats too: only the longer n-grams count.
CHINESE = Rules(
    min_tokens=80,
    max_tokens=200_000,
    min_mean_token_length=None,
    max_mean_token_length=3,
    min_letter_share=None,
    max_duplicate_5gram=None,
    max_duplicate_10gram=0.15,
)


@functools.cache
def character_flags() -> np.ndarray:
    """What each code point is, uint8 [0x110000]: bits for a letter or digit, letter, digit, symbol and white space."""
    flags = np.full(0x110000, _SYMBOL, np.uint8)  # not assigned, for the most part
    flags[0xF0000:] = 0  # private use
    points = [*range(0x40000), *range(0xE0000, 0xE1000), 0xFFFFE, 0xFFFFF, 0x10FFFE, 0x10FFFF]
    for point in points:
        one = chr(point)
        flag = one.isalnum() * _LETTER_OR_DIGIT | one.isalpha() * _LETTER | one.isdigit() * _DIGIT
        symbol = one in _MARKUP or unicodedata.category(one) in ("So", "Sk", "Cn")
        flags[point] = flag | symbol * _SYMBOL | one.isspace() * _SPACE
    return flags


def statistics(text: str, language: str, tokens: normalize.Tokens | None = None) -> dict[str, float]:
    """The statistics that `Rules` bound, by name; those that make no sense for the text are missing.

    Args:
        text: of a document.
        language: names the stop words.
        tokens: `normalize.tokenize([text])`, where that is known.
    """
    tokens = tokens or normalize.tokenize([text])
    count, length = len(tokens.hashes), max(len(text), 1)
    values: dict[str, float] = {"tokens": count}
    flags = character_flags()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    if count:
        values["mean_token_length"] = int(np.count_nonzero(flags & _LETTER_OR_DIGIT)) / count
    values["symbol_share"] = int(np.count_nonzero(flags & _SYMBOL)) / length
    values["digit_share"] = int(np.count_nonzero(flags & _DIGIT)) / length
    solid = np.concatenate([[False], flags & _SPACE == 0])
    starts = np.flatnonzero(solid[1:] & ~solid[:-1])
    if len(starts):  # what lies between white space
        with_letter = np.maximum.reduceat(flags & _LETTER, starts)
        values["letter_share"] = int(np.count_nonzero(with_letter)) / len(starts)
    values |= _line_statistics(text) | _repetitions(tokens.hashes)
    if language in STOP_WORDS:
        words = STOP_WORDS[language]
        values["stop_words"] = (
            len(words & set(text)) if language == "zh" else len(words & set(_WORD.findall(text.lower())))
        )
    return {name: round(float(value), 4) for name, value in values.items()}


def _line_statistics(text: str) -> dict[str, float]:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return {}
    seen = collections.Counter(lines)
    repeated = sum((number - 1) * len(line) for line, number in seen.items())
    return {
        "terminal_share": sum(line.endswith(_TERMINAL) for line in lines) / len(lines),
        "ellipsis_share": sum(line.endswith(_ELLIPSIS) for line in lines) / len(lines),
        "bullet_share": sum(line.startswith(_BULLETS) for line in lines) / len(lines),
        "duplicate_line_share": (len(lines) - len(seen)) / len(lines),
        "duplicate_line_characters": repeated / max(sum(map(len, lines)), 1),
    }


def _repetitions(hashes: np.ndarray) -> dict[str, float]:
    """Shares of repeated n-grams, from the hashes of the tokens of one document, uint64 [tokens]."""
    count, values = len(hashes), {}
    for size, grams in normalize.ngrams(hashes, (2, 3, 4, 5, 10)):
        grams = np.sort(grams)
        new = np.flatnonzero(grams[1:] != grams[:-1])
        if size < 5 and count >= size * 5:
            most = int(np.diff(np.concatenate([[-1], new, [len(grams) - 1]])).max())
            values[f"top_{size}gram"] = most * size / count if most > 1 else 0.0
        if size >= 5 and len(grams):
            values[f"duplicate_{size}gram"] = 1 - (len(new) + 1) / len(grams)
    return values
