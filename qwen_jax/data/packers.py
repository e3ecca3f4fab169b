"""Documents, and the four ways in which they become examples of one length (`qwen_jax.data.packing` says which).

Everything here is a function of arrays: no file, no vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# A reason to {"documents": …, "tokens": …}: what a packing took away for it.
Removed = dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized document.

    Attributes:
        tokens: int array [length].
        loss_weights: uint8 array [length], 1 where the token carries loss as a target; None means everywhere.
        segment_lengths: int array [segments] that sums to `length`: parts which attention and positions keep apart,
            such as the two sides of a pair. They stay in one example, side by side. None means one segment.
        ends: int array, ascending: numbers of tokens after which packing `whole` may cut a document that is too long.
            None means that such a document is left out.
        images: encoded files of the pictures, in the order of the text.
        image_spans: int array [images, 2]: of each picture the position of `<img>`, and that after `</img>`. Where a
            document is cut, pictures past the end go with their places, and none is cut in half.
        left_out: reason for which the task gives no tokens; only counted. "" where there are tokens.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray | None = None
    segment_lengths: np.ndarray | None = None
    ends: np.ndarray | None = None
    left_out: str = ""
    images: tuple[bytes, ...] = ()
    image_spans: np.ndarray | None = None

    def weights(self) -> np.ndarray:
        """Loss weights, uint8 [length]."""
        if self.loss_weights is None:
            return np.ones(len(self.tokens), np.uint8)
        return np.asarray(self.loss_weights, np.uint8)

    def segments(self) -> list[int]:
        """Lengths of the segments.

        Raises:
            ValueError: they are not positive, or do not sum to the number of tokens.
        """
        if self.segment_lengths is None:
            return [len(self.tokens)]
        lengths = [int(length) for length in self.segment_lengths]
        if min(lengths, default=0) < 1 or sum(lengths) != len(self.tokens):
            raise ValueError(
                f"a document has {len(self.tokens)} tokens and segments of {lengths}: they must be positive and sum up"
            )
        return lengths

    def first(self, end: int) -> "Document":
        """The first `end` tokens of a document of one segment, with their pictures."""
        count = 0 if self.image_spans is None else int((self.image_spans[:, 1] <= end).sum())
        spans = None if self.image_spans is None else self.image_spans[:count]
        weights = self.weights()[:end]
        return Document(self.tokens[:end], weights, images=self.images[:count], image_spans=spans)

    def may_end(self, end: int) -> bool:
        """Whether no picture has tokens on both sides of position `end`."""
        spans = self.image_spans
        return spans is None or not ((spans[:, 0] < end) & (end < spans[:, 1])).any()


def pack(documents: Iterable[Document], *, sequence_length: int, eos_id: int) -> Iterator[dict[str, np.ndarray]]:
    """Merges documents in the given order and cuts them.

    Args:
        documents: in the order to merge. A document that does not end with `eos_id` gets one, with loss weight 1.
        sequence_length: tokens of one example.
        eos_id: ends documents and fills the last example.

    Yields:
        `tokens` int32 [sequence_length] and `loss_weights` uint8 [sequence_length].

    Raises:
        ValueError: `sequence_length` below 2.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}: it takes at least 2 tokens to predict one")
    tokens = np.empty(sequence_length, np.int32)
    weights = np.empty(sequence_length, np.uint8)
    filled = 0
    for document in documents:
        source, source_weights = terminated(document, eos_id)
        start = 0
        while start < len(source):
            count = min(sequence_length - filled, len(source) - start)
            tokens[filled : filled + count] = source[start : start + count]
            weights[filled : filled + count] = source_weights[start : start + count]
            start, filled = start + count, filled + count
            if filled == sequence_length:
                yield {"tokens": tokens.copy(), "loss_weights": weights.copy()}
                filled = 0
    if filled:
        tokens[filled:], weights[filled:] = eos_id, 0
        yield {"tokens": tokens, "loss_weights": weights}


def best_fit(documents: Iterable[Document], *, sequence_length: int, eos_id: int) -> Iterator[dict[str, np.ndarray]]:
    """Fits whole documents into sequences, so that neither attention nor positions need to cross documents.

    A document longer than a sequence is cut into full sequences and a rest. The longest go first, each into the
    sequence in which it leaves the least room ("best fit decreasing": Johnson et al. 1974; for language models Ding et
    al. 2024, arXiv 2404.10830). Sequences come in the order of their first document, documents of one sequence in the
    order given.

    Args:
        documents, sequence_length, eos_id: see `pack`; all documents are held in memory.

    Yields:
        `tokens`, `segment_ids` and `positions` int32, `loss_weights` uint8, each [sequence_length]. Segments count from
        1, positions from 0 in each segment; filling has 0 for both (SeqIO's convention).

    Raises:
        ValueError: `sequence_length` below 2.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}: it takes at least 2 tokens to predict one")
    pieces = []
    for document in documents:
        tokens, weights = terminated(document, eos_id)
        for start in range(0, len(tokens), sequence_length):
            cut = slice(start, start + sequence_length)
            pieces.append(Document(tokens[cut], weights[cut]))
    for numbers in _assign_best_fit([len(piece.tokens) for piece in pieces], sequence_length):
        yield _example([pieces[number] for number in numbers], sequence_length, eos_id)


def whole(
    documents: Iterable[Document], *, sequence_length: int, eos_id: int, images_per_row: int = 0
) -> Iterator[dict[str, Any]]:
    """Fits documents into sequences as `best_fit` does, but adds no end-of-text and cuts none.

    All segments of a document stand in one sequence, one after the other; each has its own id and positions.

    Args:
        documents, sequence_length, eos_id: see `pack`; no document may be longer than a sequence (`fit`). `eos_id`
            only fills.
        images_per_row: the most pictures of a sequence; no document may have more.

    Yields:
        As `best_fit`; with `images`, a list of bytes in the order of the text, where a document has pictures.

    Raises:
        ValueError: `sequence_length` below 2, a document that is too long or has too many pictures, or segments that
            do not sum up.
    """
    fitting = _checked(documents, sequence_length, images_per_row)
    lengths, images = [len(document.tokens) for document in fitting], [len(document.images) for document in fitting]
    for numbers in _assign_best_fit(lengths, sequence_length, images, images_per_row):
        yield _example([fitting[number] for number in numbers], sequence_length, eos_id)


def padded(
    documents: Iterable[Document], *, sequence_length: int, eos_id: int, images_per_row: int = 0
) -> Iterator[dict[str, Any]]:
    """One document a sequence, in the order given; arguments, columns and errors as `whole`."""
    for document in _checked(documents, sequence_length, images_per_row):
        yield _example([document], sequence_length, eos_id)


def _checked(documents: Iterable[Document], sequence_length: int, images_per_row: int) -> list[Document]:
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}: it takes at least 2 tokens to predict one")
    result = list(documents)
    for document in result:
        _check_aligned(document)
        if len(document.tokens) > sequence_length:
            raise ValueError(f"a document of {len(document.tokens)} tokens does not fit into {sequence_length}: fit it")
        if len(document.images) > images_per_row:
            raise ValueError(f"a document of {len(document.images)} images does not fit into {images_per_row}: fit it")
    return result


def _example(documents: Sequence[Document], sequence_length: int, eos_id: int) -> dict[str, Any]:
    """The documents one after the other, then filling; segments count through all of them."""
    example: dict[str, Any] = {
        "tokens": np.full(sequence_length, eos_id, np.int32),
        "loss_weights": np.zeros(sequence_length, np.uint8),
        "segment_ids": np.zeros(sequence_length, np.int32),
        "positions": np.zeros(sequence_length, np.int32),
    }
    start, segment = 0, 0
    for document in documents:
        end = start + len(document.tokens)
        example["tokens"][start:end], example["loss_weights"][start:end] = document.tokens, document.weights()
        for length in document.segments():
            segment += 1
            place = slice(start, start + length)
            example["segment_ids"][place], example["positions"][place] = segment, np.arange(length)
            start += length
    if images := [image for document in documents for image in document.images]:
        example["images"] = images
    return example


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Documents that fit into an example, and what was taken away for it.

    `truncated` and `left_out` map a reason to its number of documents and of tokens that no example holds.
    """

    documents: list[Document]
    truncated: Removed
    left_out: Removed


def fit(documents: Iterable[Document], sequence_length: int, images_per_row: int = 0) -> Fitted:
    """Cuts documents that are longer than an example at the last of their `ends` that fits, or leaves them out.

    A document without tokens is left out for its own reason, `Document.left_out`, and one with more pictures than an
    example is left out, too. Segments and pictures are never cut: a document of several segments is whole or left out.

    Args:
        documents: in the order to keep.
        sequence_length: tokens of an example.
        images_per_row: the most pictures of an example.
    """
    kept: list[Document] = []
    truncated: Removed = {}
    left_out: Removed = {}
    for document in documents:
        length = len(document.tokens)
        if document.left_out or not length:
            add_removed(left_out, document.left_out or "no tokens", length)
        elif len(document.images) > images_per_row:
            add_removed(left_out, f"more than {images_per_row} images (IMAGES_PER_ROW)", length)
        elif length <= sequence_length:
            kept.append(document)
        else:
            ends = [int(end) for end in (() if document.ends is None else document.ends) if 0 < end <= sequence_length]
            ends = [end for end in ends if document.may_end(end)]
            if ends and document.segment_lengths is None:
                kept.append(document.first(ends[-1]))
                add_removed(truncated, "cut at the end of a turn", length - ends[-1])
            else:
                reason = f"longer than {sequence_length} tokens"
                add_removed(
                    left_out,
                    reason if document.ends is None else f"no turn ends within {sequence_length} tokens",
                    length,
                )
    return Fitted(kept, truncated, left_out)


def add_removed(removed: Removed, reason: str, tokens: int, documents: int = 1) -> None:
    """Counts documents and tokens that a packer truncates or leaves out, by reason."""
    entry = removed.setdefault(reason, {"documents": 0, "tokens": 0})
    entry["documents"] += documents
    entry["tokens"] += tokens


def _assign_best_fit(
    lengths: Sequence[int], capacity: int, images: Sequence[int] | None = None, most_images: int = 0
) -> list[list[int]]:
    """Numbers of the pieces (ascending) in each bin; bins in the order of their first piece.

    Among the bins with room for the tokens of a piece and for its images, the one with the least room for tokens takes
    it; of several, one with the least room for images.
    """
    images = [0] * len(lengths) if images is None else images
    bins: list[list[int]] = []
    # By room for images, then for tokens.
    by_room: list[list[list[int]]] = [[[] for _ in range(capacity + 1)] for _ in range(most_images + 1)]
    rooms = [0] * (most_images + 1)  # bit r is set where some bin has room for exactly r more tokens
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        enough = ((left, rooms[left] >> length) for left in range(images[number], most_images + 1))
        found = [(length + (bits & -bits).bit_length() - 1, left) for left, bits in enough if bits]
        if found:
            room, left = min(found)
            chosen = by_room[left][room].pop()
            if not by_room[left][room]:
                rooms[left] ^= 1 << room
        else:
            room, left, chosen = capacity, most_images, len(bins)
            bins.append([])
        bins[chosen].append(number)
        if room > length:
            by_room[left - images[number]][room - length].append(chosen)
            rooms[left - images[number]] |= 1 << (room - length)
    return sorted((sorted(numbers) for numbers in bins), key=lambda numbers: numbers[0])


def terminated(document: Document, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss weights of a document that ends with `eos_id`, which gets loss weight 1 where it is added."""
    _check_aligned(document)
    tokens, weights = np.asarray(document.tokens), document.weights()
    if len(tokens) and tokens[-1] == eos_id:
        return tokens, weights
    return np.append(tokens, eos_id), np.append(weights, np.uint8(1))


def _check_aligned(document: Document) -> None:
    tokens, weights = len(document.tokens), len(document.weights())
    if tokens != weights:
        raise ValueError(f"a document has {tokens} tokens and {weights} loss weights: they must be aligned")
