"""Packing: documents become examples of one length, and examples become files.

A hash of (seed, tokens) orders the documents, and end-of-text follows each of them. `PACKINGS` has two ways to pack:

    concat    all are concatenated and cut into pieces of `sequence_length` tokens (report section 2.4)
    best_fit  whole documents are fitted into sequences, each keeps to itself: `segment_ids`, `positions` say where

No token is lost or repeated: end-of-text of loss weight 0 fills the free end of an example.

On disk a split is a folder of ArrayRecord shards and one `manifest.json`. A record is one example: its columns one
after the other, little-endian, without header, so that an example is read with one seek and no parsing. The manifest
lists the columns; it is written last, so a folder with a manifest is complete.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from qwen_jax import files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# One record a group: reading an example never decompresses another.
WRITER_OPTIONS = "group_size:1,zstd:3"


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized document.

    Attributes:
        tokens: int array [length].
        loss_weights: uint8 array [length], 1 where the token carries loss as a target; None means everywhere.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray | None = None

    def weights(self) -> np.ndarray:
        """Loss weights, uint8 [length]."""
        if self.loss_weights is None:
            return np.ones(len(self.tokens), np.uint8)
        return np.asarray(self.loss_weights, np.uint8)


def document_key(document: Document, seed: int) -> bytes:
    """16 bytes that order a document among all others: a hash of seed, tokens and loss weights.

    It depends neither on the file that the document came from nor on the machine. Only equal documents have equal
    keys, and their order among each other cannot be seen.
    """
    digest = hashlib.blake2b(digest_size=16, key=f"pack:{seed}".encode())
    digest.update(np.ascontiguousarray(document.tokens, "<i4").tobytes())
    digest.update(document.weights().tobytes())
    return digest.digest()


def shard_of(key: bytes, num_shards: int) -> int:
    """The shard, in [0, num_shards), that the document with this key belongs to."""
    return int.from_bytes(key[:8], "little") % num_shards


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
        source, source_weights = _terminated(document, eos_id)
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
        tokens, weights = _terminated(document, eos_id)
        for start in range(0, len(tokens), sequence_length):
            pieces.append((tokens[start : start + sequence_length], weights[start : start + sequence_length]))
    for numbers in _assign_best_fit([len(tokens) for tokens, _ in pieces], sequence_length):
        example = {
            "tokens": np.full(sequence_length, eos_id, np.int32),
            "loss_weights": np.zeros(sequence_length, np.uint8),
            "segment_ids": np.zeros(sequence_length, np.int32),
            "positions": np.zeros(sequence_length, np.int32),
        }
        start = 0
        for segment, number in enumerate(numbers, start=1):
            tokens, weights = pieces[number]
            place = slice(start, start + len(tokens))
            example["tokens"][place], example["loss_weights"][place] = tokens, weights
            example["segment_ids"][place], example["positions"][place] = segment, np.arange(len(tokens))
            start += len(tokens)
        yield example


def _assign_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the pieces (ascending) in each bin; bins in the order of their first piece."""
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some bin has room for exactly r more tokens
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(number)
        if room > length:
            by_room[room - length].append(chosen)
            rooms |= 1 << (room - length)
    return sorted((sorted(numbers) for numbers in bins), key=lambda numbers: numbers[0])


PACKINGS = {"concat": pack, "best_fit": best_fit}


def check_packing(name: str) -> str:
    """Returns `name`, a key of `PACKINGS`.

    Raises:
        ValueError: there is no such packing.
    """
    if name not in PACKINGS:
        raise ValueError(f"packing is {name!r}: it must be one of {', '.join(PACKINGS)}")
    return name


def _terminated(document: Document, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, weights = np.asarray(document.tokens), document.weights()
    if len(tokens) != len(weights):
        raise ValueError(f"a document has {len(tokens)} tokens and {len(weights)} loss weights: they must be aligned")
    if len(tokens) and tokens[-1] == eos_id:
        return tokens, weights
    return np.append(tokens, eos_id), np.append(weights, np.uint8(1))


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a record: `sequence_length` values of `dtype` (a little-endian numpy name such as `uint16`)."""

    name: str
    dtype: str


def columns_for(vocab_size: int, sequence_length: int, packing: str = "concat") -> tuple[Column, ...]:
    """Columns of an example; ids, segments and positions take two bytes each where that is enough."""
    columns = (Column("tokens", "uint16" if vocab_size <= 1 << 16 else "uint32"), Column("loss_weights", "uint8"))
    if check_packing(packing) == "concat":
        return columns
    dtype = "uint16" if sequence_length < 1 << 16 else "uint32"
    return (*columns, Column("segment_ids", dtype), Column("positions", dtype))


def record_bytes(columns: Sequence[Column], sequence_length: int) -> int:
    """Bytes of one record."""
    return sum(np.dtype(column.dtype).itemsize for column in columns) * sequence_length


def encode_record(example: Mapping[str, np.ndarray], columns: Sequence[Column]) -> bytes:
    """The record of one example ([sequence_length] a column)."""
    return b"".join(example[c.name].astype(np.dtype(c.dtype).newbyteorder("<")).tobytes() for c in columns)


def decode_records(records: Sequence[bytes], columns: Sequence[Column], sequence_length: int) -> dict[str, np.ndarray]:
    """Columns of records, each [len(records), sequence_length] in the column's own dtype.

    Raises:
        ValueError: the size of a record does not fit the columns.
    """
    size = record_bytes(columns, sequence_length)
    for index, record in enumerate(records):
        if len(record) != size:
            raise ValueError(f"record {index} has {len(record)} bytes, expected {size}")
    table = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
    result, offset = {}, 0
    for column in columns:
        dtype = np.dtype(column.dtype).newbyteorder("<")
        width = dtype.itemsize * sequence_length
        result[column.name] = np.ascontiguousarray(table[:, offset : offset + width]).view(dtype)
        offset += width
    return result


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file and its contents.

    `tokens` counts documents and their end-of-text, not the filling of the last example; `loss_tokens` those with loss
    weight 1; `text_bytes` is the UTF-8 size of the documents' text after NFC; `file_bytes` the size of the file.
    """

    file: str
    records: int
    tokens: int
    loss_tokens: int
    documents: int
    text_bytes: int
    file_bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, for one packed split. Counts over all shards are properties."""

    task: str
    split: str
    sequence_length: int
    vocab_size: int
    vocabulary_fingerprint: str
    seed: int
    columns: tuple[Column, ...]
    shards: tuple[Shard, ...]
    source: Mapping
    format_version: int = FORMAT_VERSION

    @property
    def records(self) -> int:
        """Number of examples."""
        return sum(shard.records for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens, without filling."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(shard.loss_tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def packing(self) -> str:
        """How documents were packed: a key of `PACKINGS`."""
        return "best_fit" if any(column.name == "segment_ids" for column in self.columns) else "concat"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: the identity of the packed data."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Writes `folder/manifest.json` atomically."""
        totals = {name: getattr(self, name) for name in ("records", "tokens", "loss_tokens", "documents", "text_bytes")}
        files.write_json(folder / MANIFEST, {"totals": totals} | dataclasses.asdict(self), sort_keys=True)
        return folder / MANIFEST

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads `folder/manifest.json`.

        Raises:
            FileNotFoundError: the folder has no manifest.
            ValueError: the file is not a manifest of this format version.
        """
        path = Path(folder) / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
            fields.pop("totals")
            columns = tuple(Column(**column) for column in fields.pop("columns"))
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            return cls(columns=columns, shards=shards, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a manifest of packed examples ({error}): delete its folder and cache the task again"
            ) from error


def packed_folder(
    cache_dir: str | os.PathLike, task: str, sequence_length: int, split: str, packing: str = "concat"
) -> Path:
    """Folder of the packed examples: `cache_dir/task/packed-<length>/split`, or `…/packed-<length>-best_fit/split`."""
    ending = "" if check_packing(packing) == "concat" else f"-{packing}"
    return Path(cache_dir, *task.split(":"), f"packed-{sequence_length}{ending}", split)


def is_packed(
    mixture_or_task: str,
    *,
    cache_dir: str | os.PathLike,
    sequence_length: int,
    packing: str = "concat",
    splits: Sequence[str] = ("train", "validation"),
) -> bool:
    """Whether all `splits` of a task have a manifest; False for mixtures, which only SeqIO knows."""
    folders = (packed_folder(cache_dir, mixture_or_task, sequence_length, split, packing) for split in splits)
    return all((folder / MANIFEST).is_file() for folder in folders)


def spread_copies(documents: Iterable[tuple[bytes, Document]]) -> Iterator[tuple[bytes, Document]]:
    """Gives each further copy of a document (up-sampled sources have some) a key of its own.

    With one key they would be merged one after the other, and a model would learn to repeat. Copies are equal, so
    which of them comes first makes no difference.
    """
    copies: dict[bytes, int] = {}
    for key, document in documents:
        number = copies[key] = copies.get(key, -1) + 1
        yield hashlib.blake2b(key + number.to_bytes(8, "little"), digest_size=16).digest() if number else key, document


def write_shard(
    path: Path,
    documents: Iterable[tuple[bytes, Document]],
    *,
    sequence_length: int,
    eos_id: int,
    columns: Sequence[Column],
    token_bytes: np.ndarray,
) -> Shard:
    """Sorts documents by key, packs them and writes one ArrayRecord file, which appears only when it is whole.

    Args:
        path: the file; its bytes depend only on the set of documents.
        documents: (key, document) in any order; all are held in memory.
        sequence_length, eos_id: see `pack`.
        columns: the columns to write; with `segment_ids`, documents are packed by `best_fit`, else by `pack`.
        token_bytes: int array [vocab_size], UTF-8 bytes of text that each id stands for (0 for control tokens).
    """
    ordered = [document for _, document in sorted(spread_copies(documents), key=lambda item: item[0])]
    terminated = [Document(*_terminated(document, eos_id)) for document in ordered]
    records = 0
    packer = best_fit if any(column.name == "segment_ids" for column in columns) else pack
    with files.new_file(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for example in packer(terminated, sequence_length=sequence_length, eos_id=eos_id):
            writer.write(encode_record(example, columns))
            records += 1
        writer.close()
        file_bytes = temporary.stat().st_size
    return Shard(
        file=path.name,
        records=records,
        tokens=sum(len(document.tokens) for document in terminated),
        loss_tokens=sum(int(document.weights().sum()) for document in terminated),
        documents=len(terminated),
        text_bytes=sum(int(token_bytes[document.tokens].sum()) for document in terminated),
        file_bytes=file_bytes,
    )
