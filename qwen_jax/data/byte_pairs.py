"""Learning a byte-pair vocabulary on top of another one (report section 2.2).

The report starts from cl100k_base, splits numbers into digits and adds tokens of further languages. So does this
module: `without_numbers` takes the tokens of several digits out of a base, `PieceCounts` counts the pieces into which
the pattern cuts text, with a weight for each language, and `learn_merges` encodes the pieces with the base and goes on
with byte-pair encoding over its tokens. Base ranks do not change; new tokens follow them.

The algorithm is that of `tokenizers.trainers.BpeTrainer` (Sennrich et al. 2016, arXiv 1508.07909: join the commonest
pair, again and again), ties included, and gives the same merges without base and weights, which that trainer lacks. It
works on arrays: all pieces lie one after the other in a linked list, a pair is the array of its places, and one merge
is a handful of numpy calls, however often it occurs.
"""

import collections
import heapq
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import numpy as np
import regex
import tiktoken

from qwen_jax.data.tokenizer import PATTERN, normalize

logger = logging.getLogger(__name__)

_ASCII_DIGITS = frozenset(b"0123456789")
_PROGRESS_SECONDS = 10
_SHIFT = 32  # a pair of ids (left, right) is the number left << 32 | right
_END, _GONE = -1, -2  # between two pieces; a place whose token went into the one before it


def byte_ranks() -> dict[bytes, int]:
    """The 256 single bytes in the order of GPT-2 and of the released vocabulary: visible Latin-1 first.

    It is the base of a vocabulary that is learned from text alone.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted({*range(256)} - {*visible})
    return {bytes([byte]): rank for rank, byte in enumerate([*visible, *hidden])}


def without_numbers(ranks: Mapping[bytes, int]) -> dict[bytes, int]:
    """Ranks without the tokens that hold more than one ASCII digit; the others keep their order and close up.

    cl100k_base loses its 1,100 numbers of two and three digits so, and becomes the first 99,156 released ranks. (They
    include two numbers of full-width digits, which the pattern never lets through whole.)
    """
    kept = [token for token in sorted(ranks, key=ranks.__getitem__) if sum(byte in _ASCII_DIGITS for byte in token) < 2]
    return {token: rank for rank, token in enumerate(kept)}


class PieceCounts:
    """Counts of the pieces of text, over sources of different weight.

    The pattern of the tokenizer cuts NFC-normalized text into pieces; no token reaches over two of them.

    Attributes:
        characters: characters of text added.
        documents: texts added.
    """

    def __init__(self, pattern: str = PATTERN):
        self._find = regex.compile(pattern).findall
        self._weighted: list[tuple[collections.Counter, Fraction]] = []
        self.characters = self.documents = 0

    def add(self, texts: Iterable[str], weight: Fraction | int = 1) -> None:
        """Counts the pieces of `texts`; each occurrence counts `weight`.

        Raises:
            ValueError: the weight is not positive.
        """
        if weight <= 0:
            raise ValueError(f"the weight of a corpus is {weight}: it must be positive")
        counter: collections.Counter = collections.Counter()
        logged = time.monotonic()
        for text in texts:
            self.documents += 1
            self.characters += len(text)
            counter.update(self._find(normalize(text)))
            if time.monotonic() - logged > _PROGRESS_SECONDS:
                logged = time.monotonic()
                logger.info("read %s documents, %s characters", f"{self.documents:,}", f"{self.characters:,}")
        self._weighted.append((counter, Fraction(weight)))

    def merged(self) -> tuple[dict[str, int], int]:
        """({piece: weighted count times scale}, scale), where scale makes all counts whole numbers."""
        scale = int(np.lcm.reduce([weight.denominator for _, weight in self._weighted] or [1], dtype=object))
        total: dict[str, int] = {}
        for counter, weight in self._weighted:
            factor = int(weight * scale)
            for piece, count in counter.items():
                total[piece] = total.get(piece, 0) + count * factor
        return total, scale


def learn_merges(
    counts: PieceCounts, base: Mapping[bytes, int], num_merges: int, *, min_count: int = 2
) -> dict[bytes, int]:
    """Adds the `num_merges` commonest merges to a base vocabulary.

    Args:
        counts: the text to learn from.
        base: token bytes to rank, 0 to n-1; all 256 single bytes are among the tokens.
        num_merges: largest number of tokens to add.
        min_count: a pair that occurs less often (by weighted count) is not merged.

    Returns:
        Token bytes to rank: `base`, then the merges in their order; fewer than `num_merges` if the text has no further
        pair of `min_count`.

    Raises:
        ValueError: a merge makes a token of the base, so the base is no vocabulary of byte-pair encoding.
    """
    pieces, scale = counts.merged()
    tokens = [token for token, _ in sorted(base.items(), key=lambda item: item[1])]
    known = set(tokens)
    for left, right in _merges(_Places(pieces, base), len(base), num_merges, min_count * scale):
        token = tokens[left] + tokens[right]
        if token in known:
            raise ValueError(
                f"the base has {token!r} but encodes it as {tokens[left]!r} + {tokens[right]!r}: it is not a "
                "vocabulary of byte-pair encoding (tokens must be made of tokens of lower rank)"
            )
        known.add(token)
        tokens.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


class _Places:
    """All pieces as one linked list of tokens.

    Attributes:
        token: int32 [places], ids; `_END` before, between and after pieces.
        next, previous: int32 [places], neighbors among the places that still hold a token.
        weight: int64 [places], count of the piece that a place belongs to.
    """

    def __init__(self, pieces: Mapping[str, int], base: Mapping[bytes, int]):
        # Here a piece is never cut again.
        encoding = tiktoken.Encoding("base", pat_str=r"(?s:.+)", mergeable_ranks=dict(base), special_tokens={})
        names = list(pieces)
        lengths = np.zeros(len(names), np.int64)
        parts = []
        for start in range(0, len(names), 1 << 16):
            encoded = encoding.encode_ordinary_batch(names[start : start + (1 << 16)], num_threads=2)
            for number, ids in enumerate(encoded, start=start):
                if len(ids) > 1:  # else there is nothing to merge
                    lengths[number] = len(ids) + 1
                    ids.append(_END)
            flat = (token for ids in encoded if len(ids) > 1 for token in ids)
            parts.append(np.fromiter(flat, np.int32))
        self.token = np.concatenate([np.array([_END], np.int32), *parts])
        self.next = np.arange(1, len(self.token) + 1, dtype=np.int32)
        self.previous = np.arange(-1, len(self.token) - 1, dtype=np.int32)
        self._piece = np.repeat(np.arange(len(names), dtype=np.int32), lengths)
        self._count = np.fromiter(pieces.values(), np.int64, len(names))

    def weights(self, places: np.ndarray) -> np.ndarray:
        """int64, the count of the piece that each place belongs to."""
        return self._count[self._piece[places - 1]]

    def pairs(self, places: np.ndarray) -> np.ndarray:
        """int64, the pair that begins at each place."""
        return self.token[places].astype(np.int64) << _SHIFT | self.token[self.next[places]]

    def starts(self) -> np.ndarray:
        """int32, the places at which a pair begins."""
        inside = self.token >= 0
        return np.flatnonzero(inside[:-1] & inside[1:]).astype(np.int32)

    def still(self, places: np.ndarray, left: int, right: int) -> np.ndarray:
        """The `places` at which the pair (left, right) still begins."""
        places = places[self.token[places] == left]
        return places[self.token[self.next[places]] == right]

    def merge(self, places: np.ndarray, left: int, right: int, new: int) -> np.ndarray:
        """Joins the pair that begins at `places` (ascending); returns the places at which a new pair begins."""
        if left == right:
            places = _every_second(places, self.next)
        second = self.next[places]
        after = self.next[second]
        self.token[places], self.token[second] = new, _GONE
        self.next[places], self.previous[after] = after, places
        before = self.previous[places]
        before = before[(self.token[before] >= 0) & (self.token[before] != new)]
        return np.concatenate([before, places[self.token[after] >= 0]])


def _every_second(places: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The first, third, … place of each run of overlapping pairs, as in `aaa`: the merge goes from left to right."""
    index = np.arange(len(places))
    first = np.ones(len(places), bool)
    first[1:] = following[places[:-1]] != places[1:]
    return places[(index - np.maximum.accumulate(np.where(first, index, 0))) % 2 == 0]


class _Group:
    """Pairs that came up at one time, and their places."""

    def __init__(self, places: _Places, starts: np.ndarray, min_count: int):
        keys = places.pairs(starts)
        order = np.argsort(keys, kind="stable")  # places of one pair stay ascending
        keys, starts = keys[order], starts[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        last = np.append(first[1:], len(keys))
        counts = np.add.reduceat(places.weights(starts), first) if len(first) else np.zeros(0, np.int64)
        kept = counts >= min_count
        self.keys, self.counts = keys[first[kept]], counts[kept]
        # Most pairs are rare; their places are not kept.
        self._starts = starts[np.repeat(kept, last - first)]
        self._last = np.cumsum((last - first)[kept])
        self._first = self._last - (last - first)[kept]

    def at_least(self, low: int, high: int | None = None) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(minus count, left, right, places) of the pairs whose first count was in [low, high)."""
        chosen = self.counts >= low
        if high is not None:
            chosen &= self.counts < high
        for i in np.flatnonzero(chosen):
            key = int(self.keys[i])
            where = self._starts[self._first[i] : self._last[i]]
            yield -int(self.counts[i]), key >> _SHIFT, key & ((1 << _SHIFT) - 1), where


def _merges(places: _Places, num_base: int, num_merges: int, min_count: int) -> Iterator[tuple[int, int]]:
    """(left id, right id) of the merges, commonest first; of equals the one with the lowest ids.

    A pair never becomes commoner after it came up, so a count that is out of date is an upper bound: the top of the
    heap is counted again, and is the commonest if the count was right. Only pairs above a falling threshold are in the
    heap, because most pairs never get near its top.
    """
    groups = [_Group(places, places.starts(), min_count)]
    threshold = max(int(groups[0].counts.max(initial=0)) // 2, min_count)
    heap = list(groups[0].at_least(threshold))
    heapq.heapify(heap)
    logged, made = time.monotonic(), 0
    while made < num_merges:
        if not heap or -heap[0][0] < threshold:
            if threshold <= min_count:
                return
            low = max(threshold // 2, min_count)
            heap.extend(entry for group in groups for entry in group.at_least(low, threshold))
            heapq.heapify(heap)
            threshold = low
            continue
        negative, left, right, where = heapq.heappop(heap)
        where = places.still(where, left, right)
        count = int(places.weights(where).sum())
        if count != -negative:
            if count >= min_count:
                heapq.heappush(heap, (-count, left, right, where))
            continue
        yield left, right
        group = _Group(places, places.merge(where, left, right, num_base + made), min_count)
        for entry in group.at_least(threshold):
            heapq.heappush(heap, entry)
        if len(group.counts) and group.counts.min() < threshold:
            groups.append(group)
        made += 1
        if time.monotonic() - logged > _PROGRESS_SECONDS:
            logged = time.monotonic()
            logger.info("%s of %s merges, the last one of count %s", f"{made:,}", f"{num_merges:,}", f"{count:,}")
