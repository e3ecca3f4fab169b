"""Duplicates: exact ones by a digest, near ones by MinHash, LSH and connected components (report section 2.1).

Broder, "On the resemblance and containment of documents" (1997), for MinHash; Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", chapter 3, for bands. LSH only proposes pairs: each is then checked by the exact Jaccard
similarity of the two sets of shingles, so that a pair is near-duplicate if and only if a band proposes it and its
similarity reaches the threshold.

Functions work on arrays of a batch, a shard or a band; `qwen_jax.curation.pipeline` keeps these in files, so memory
does not grow with the corpus. A document is a number here (uint64), whose order is that of the corpus.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qwen_jax.curation import normalize

# Number of documents of a bucket that are compared with all others of it; see `candidate_pairs`.
_LEADERS = 16
_BATCH_CHARACTERS = 1 << 20
_PAIRS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class FuzzyConfig:
    """Definition of near-duplicates.

    Attributes:
        threshold: Jaccard similarity of the sets of shingles, in (0, 1].
        shingle: tokens in a shingle (words; characters of Chinese and other scripts without spaces).
        bands, rows: a pair of similarity s is proposed with probability 1 - (1 - s**rows)**bands: 0.998 at 0.8 for
            the defaults. At the threshold it must be 0.95 or more.
        seed: of the hash functions.
    """

    threshold: float = 0.8
    shingle: int = 5
    bands: int = 20
    rows: int = 6
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"FuzzyConfig.threshold is {self.threshold}, expected a similarity in (0, 1]")
        for name in ("shingle", "bands", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"FuzzyConfig.{name} is {getattr(self, name)}, expected at least 1")
        found = self.proposal_probability(self.threshold)
        if found < 0.95:
            raise ValueError(
                f"FuzzyConfig: with {self.bands} bands of {self.rows} rows, only {found:.0%} of the pairs at the "
                f"threshold {self.threshold} would be found: take fewer rows or more bands"
            )

    @property
    def num_hashes(self) -> int:
        """Hash functions of a signature."""
        return self.bands * self.rows

    def proposal_probability(self, similarity: float) -> float:
        """Probability that some band proposes a pair of this Jaccard similarity."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def digests(tokens: normalize.Tokens) -> np.ndarray:
    """128 bits for the token sequence of each document, uint64 [documents, 2]: equal for equal normalized texts."""
    made = b"".join(
        hashlib.blake2b(tokens.hashes[begin:end].data, digest_size=16).digest()
        for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    )
    return np.frombuffer(made, np.uint64).reshape(-1, 2)


def signatures(shingles: np.ndarray, offsets: np.ndarray, num_hashes: int, seed: int = 0) -> np.ndarray:
    """MinHash signatures, uint32 [documents, num_hashes], of sets of 32-bit shingles (see `normalize.shingles`).

    The share of equal places of two signatures estimates the Jaccard similarity of the sets. A hash function is
    x -> a·x + b modulo 2**32 with odd a, a permutation of the values. Empty sets get the largest value everywhere.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    factors = generator.integers(0, 1 << 31, num_hashes, np.uint32) * np.uint32(2) + np.uint32(1)
    terms = generator.integers(0, 1 << 32, num_hashes, np.uint32)
    result = np.full((num_hashes, len(offsets) - 1), np.iinfo(np.uint32).max, np.uint32)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        starts = offsets[:-1][filled]
        values = np.empty_like(shingles)
        for row, (factor, term) in enumerate(zip(factors, terms, strict=True)):
            np.multiply(shingles, factor, out=values)
            values += term
            result[row, filled] = np.minimum.reduceat(values, starts)
    return np.ascontiguousarray(result.T)


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit key for each band of each signature, uint64 [bands, documents]."""
    keys = np.empty((bands, len(signature)), np.uint64)
    for band in range(bands):
        key = np.full(len(signature), band, np.uint64)
        for value in signature[:, band * rows : (band + 1) * rows].T:
            key = normalize.mix(key ^ value)
        keys[band] = key
    return keys


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Data of a batch of documents for deduplication.

    Attributes:
        digests: uint64 [documents, 2].
        keys: uint64 [bands, documents].
        shingles, offsets: see `normalize.shingles`.
    """

    digests: np.ndarray
    keys: np.ndarray
    shingles: np.ndarray
    offsets: np.ndarray


def sketch(texts: Sequence[str], config: FuzzyConfig) -> Sketch:
    """Digests, shingles and band keys of a batch of texts; see `batches` for how large a batch should be."""
    tokens = normalize.tokenize(texts)
    sets, offsets = normalize.shingles(tokens, config.shingle)
    signature = signatures(sets, offsets, config.num_hashes, config.seed)
    return Sketch(digests(tokens), band_keys(signature, config.bands, config.rows), sets, offsets)


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Groups of texts of about a million characters, over which the cost of calling numpy is spread."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def candidate_pairs(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Pairs of documents that share a bucket of one band.

    In a bucket of n documents, the first 16 are paired with all after them, and neighbors with each other: all pairs
    of usual buckets, and a number linear in n for text that thousands of pages share.

    Args:
        keys: uint64 [documents], of one band.
        documents: uint64 [documents], ascending.

    Returns:
        uint64 [pairs, 2], unique, each row ascending, rows sorted.
    """
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    new = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(keys)))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    if not len(starts):
        return np.zeros((0, 2), np.uint64)
    members = _ranges(starts, sizes)
    first, rank = np.repeat(starts, sizes), members - np.repeat(starts, sizes)
    pairs = []
    for leader in range(min(_LEADERS, int(sizes.max()) - 1)):
        later = rank > leader
        pairs.append(np.stack([documents[first[later] + leader], documents[members[later]]], 1))
    neighbors = members[rank > _LEADERS]
    pairs.append(np.stack([documents[neighbors - 1], documents[neighbors]], 1))
    return unique_pairs(np.concatenate(pairs))


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """Sorted rows of uint64 [pairs, 2] without repetitions."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    if not len(pairs):
        return pairs
    return pairs[np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(1)])]


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers start … start + size - 1 of each range, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def similarities(pairs: np.ndarray, shingles_of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Exact Jaccard similarity of each pair, float64 [pairs].

    Args:
        pairs: uint64 [pairs, 2].
        shingles_of: gives for uint64 [documents] their shingles, concatenated, and the number of each, int64
            [documents]. It may read them from a file: 2,048 pairs are asked for at a time.
    """
    result = np.zeros(len(pairs))
    for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[begin : begin + _PAIRS_AT_ONCE]
        documents, inverse = np.unique(part, return_inverse=True)
        sets, counts = shingles_of(documents)
        starts = np.cumsum(counts) - counts
        left, right = inverse.reshape(part.shape).T
        values = []
        for side in (left, right):
            which = np.repeat(np.arange(len(part), dtype=np.uint64), counts[side])
            values.append((which << np.uint64(32)) | sets[_ranges(starts[side], counts[side])])
        merged = np.concatenate(values)
        merged.sort()
        shared = merged[1:][merged[1:] == merged[:-1]] >> np.uint64(32)
        common = np.bincount(shared.astype(np.int64), minlength=len(part))
        result[begin : begin + _PAIRS_AT_ONCE] = common / np.maximum(counts[left] + counts[right] - common, 1)
    return result


def components(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of the graph whose edges are `pairs`, uint64 [pairs, 2].

    Returns:
        uint64 [documents], the documents that have an edge, ascending, and int64 [documents], the component of each.
    """
    documents, inverse = np.unique(pairs, return_inverse=True)
    left, right = inverse.reshape(pairs.shape).T
    graph = coo_array((np.ones(len(pairs), np.int8), (left, right)), shape=(len(documents), len(documents)))
    return documents, connected_components(graph, directed=False)[1].astype(np.int64)


def representatives(component: np.ndarray, priority: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The row of the document kept of each component, for each row, int64 [documents].

    The rule: of the source with the smallest `priority`; among these the longest; among these the first of the corpus.

    Args:
        component: int64 [documents], rows in the order of the corpus.
        priority, length: integers [documents].
    """
    order = np.lexsort((np.arange(len(component)), -length.astype(np.int64), priority, component))
    first = np.concatenate([[True], component[order][1:] != component[order][:-1]]) if len(order) else []
    kept = order[np.flatnonzero(first)]
    # Components are numbered without gaps, so the n-th that is kept is that of component n.
    _, dense = np.unique(component, return_inverse=True)
    return kept[dense]


def find_clusters(texts: Sequence[str], config: FuzzyConfig = FuzzyConfig()) -> np.ndarray:
    """For texts that fit in memory: the number of the first text of the cluster of each, int64 [texts].

    The pipeline does the same with files.
    """
    return cluster([sketch(batch, config) for batch in batches(iter(texts))], config)


def cluster(parts: Sequence[Sketch], config: FuzzyConfig) -> np.ndarray:
    """As `find_clusters`, from the sketches of consecutive batches of texts."""
    if not parts:
        return np.zeros(0, np.int64)
    sets = np.concatenate([part.shingles for part in parts])
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    starts = np.cumsum(counts) - counts
    filled = np.flatnonzero(counts)

    def shingles_of(documents):
        documents = documents.astype(np.int64)
        return sets[_ranges(starts[documents], counts[documents])], counts[documents]

    keys = np.concatenate([part.keys for part in parts], axis=1)
    pairs = [candidate_pairs(one[filled], filled.astype(np.uint64)) for one in keys]
    proposed = unique_pairs(np.concatenate(pairs))
    edges = proposed[similarities(proposed, shingles_of) >= config.threshold]
    result = np.arange(len(counts))
    documents, component = components(edges)
    same = np.zeros(len(documents), np.int64)
    result[documents.astype(np.int64)] = documents[representatives(component, same, same)].astype(np.int64)
    return result
