"""Text as deduplication and decontamination see it: tokens without regard to case, white space and punctuation.

A token is a word, or one character of a script written without spaces (Chinese, Japanese, Thai, …). Everything is done
for a batch of documents at once on arrays of code points: a Python loop over tokens would take most of the time of
deduplication.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

SEPARATOR, WORD, IDEOGRAPH = 0, 1, 2
# Scripts written without spaces, whose characters are tokens: Thai to Lao, Myanmar, Khmer, kana and CJK.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2**64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_WINDOW_BASE = np.uint64(0xC2B2AE3D27D4EB4F)


def canonical(text: str) -> str:
    """NFKC and case folding; full-width and half-width forms, ligatures and cases become one."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@functools.cache
def character_classes() -> np.ndarray:
    """SEPARATOR, WORD or IDEOGRAPH for every code point, uint8 [0x110000]. Marks belong to words."""
    classes = np.zeros(0x110000, np.uint8)
    letters = [point for point in range(0x30000) if unicodedata.category(chr(point))[0] in "LMN"]
    classes[letters] = WORD
    for first, last in _UNSPACED:
        part = classes[first : last + 1]
        part[part == WORD] = IDEOGRAPH
    classes[0x30000:0x40000] = IDEOGRAPH
    return classes


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse, uint64 [count] each."""
    both = []
    for base in (_BASE, _INVERSE):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        both.append(np.multiply.accumulate(factors))
    return both[0], both[1]


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over all (the finalizer of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of documents, as hashes.

    Attributes:
        hashes: uint64 [tokens], documents one after the other; equal tokens have equal hashes in every process.
        ideograph: bool [tokens], whether it is one character of a script without spaces.
        offsets: int64 [documents + 1], where documents begin and end.
    """

    hashes: np.ndarray
    ideograph: np.ndarray
    offsets: np.ndarray


def tokenize(texts: Sequence[str]) -> Tokens:
    """Hashes of the tokens of each text, after `canonical`."""
    folded = [canonical(text) for text in texts]
    lengths = np.fromiter(map(len, folded), np.int64, len(folded))
    joined = "\n".join(folded)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    classes = np.zeros(len(points) + 2, np.uint8)
    np.take(character_classes(), points, out=classes[1:-1])
    here, before, after = classes[1:-1], classes[:-2], classes[2:]
    single = here == IDEOGRAPH
    word = here == WORD
    starts = np.flatnonzero(single | (word & (before != WORD)))
    ends = np.flatnonzero(single | (word & (after != WORD))) + 1
    # Sums of character times power, differences of which are the hash of a token wherever it stands.
    size = 1 << max(12, int(len(points)).bit_length())
    powers, inverses = _powers(size)
    sums = np.zeros(len(points) + 1, np.uint64)
    weights = points.astype(np.uint64)
    weights += np.uint64(1)
    weights *= np.uint64(0xD6E8FEB86659FD93)
    weights ^= weights >> np.uint64(32)
    weights *= powers[: len(points)]
    np.cumsum(weights, out=sums[1:])
    hashes = mix((sums[ends] - sums[starts]) * inverses[starts])
    begins = np.concatenate([[0], np.cumsum(lengths + 1)])
    return Tokens(hashes, single[starts], np.searchsorted(starts, begins).astype(np.int64))


def windows(tokens: Tokens, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of `size` consecutive tokens within a document.

    Returns:
        uint64 [windows] hashes, in order, and int64 [windows], the position of the first token of each in
        `tokens.hashes`. A document with fewer tokens than `size` has no window.
    """
    count = len(tokens.hashes) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    sums = np.zeros(count, np.uint64)
    for step in range(size):
        sums *= _WINDOW_BASE
        sums += tokens.hashes[step : step + count]
    # A window may not reach over the end of its document. Where a document is shorter than `size`, this also marks
    # tokens of those before it, which are too near their own ends anyway.
    inside = np.ones(len(tokens.hashes), bool)
    for step in range(1, size):
        positions = tokens.offsets[1:] - step
        inside[positions[positions >= 0]] = False
    where = np.flatnonzero(inside[:count])
    return mix(sums[where]), where


def ngrams(hashes: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each size with values for so many consecutive tokens of one document, uint64 [n-grams].

    Of one size, the values of two n-grams are equal where their `windows` are; they are not spread over all bits.

    Args:
        hashes: uint64 [tokens].
        sizes: each one more than the one before, or twice as large; before the first is 1.
    """
    before, size_before = hashes, 1
    for size in sizes:
        step = size - size_before
        if step not in (1, size_before):
            raise ValueError(f"n-grams of {size} tokens cannot be made from those of {size_before}")
        ends = hashes if step == 1 else before
        count = max(len(hashes) - size + 1, 0)
        factor = np.uint64(pow(int(_WINDOW_BASE), step, 1 << 64))
        before, size_before = before[:count] * factor + ends[size_before : size_before + count], size
        yield size, before


def shingles(tokens: Tokens, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The set of windows of each document, as sorted 32-bit hashes.

    A document with fewer tokens than `size` has one shingle, of all of them; one without tokens has none.

    Returns:
        uint32 [shingles], sorted and unique within a document, and int64 [documents + 1] offsets.
    """
    hashes, where = windows(tokens, size)
    documents = np.searchsorted(tokens.offsets, where, side="right") - 1
    counts = np.diff(tokens.offsets)
    short = np.flatnonzero((counts > 0) & (counts < size))
    if len(short):
        whole = np.zeros(len(short), np.uint64)
        for row, document in enumerate(short):
            for one in tokens.hashes[tokens.offsets[document] : tokens.offsets[document + 1]]:
                whole[row : row + 1] = whole[row : row + 1] * _WINDOW_BASE + one
        hashes = np.concatenate([hashes, mix(whole)])
        documents = np.concatenate([documents, short])
    keys = (documents.astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32))
    keys.sort()
    if len(keys):
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    offsets = np.searchsorted(keys, np.arange(len(counts) + 1, dtype=np.uint64) << np.uint64(32))
    return keys.astype(np.uint32), offsets.astype(np.int64)
