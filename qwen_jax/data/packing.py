"""Packing: documents become examples of one length, and examples become files.

A hash of (seed, tokens) orders the documents. `PACKINGS` has four ways to pack:

    concat    all are concatenated and cut into pieces of `sequence_length` tokens (report section 2.4)
    best_fit  documents are fitted into sequences, each keeps to itself: `segment_ids`, `positions` say where
    whole     as `best_fit`, but no document is ever cut into two examples: for conversations and pairs
    padded    one document an example: for prompts that a model is to continue

In `concat` and `best_fit` end-of-text follows each document, and no token is lost or repeated. `whole` and `padded`
take documents as they are, which may consist of several segments; one longer than an example is cut where the document
allows it, or left out. The manifest counts both, by reason. End-of-text of loss weight 0 fills the free end of an
example. Documents may have pictures, of which an example holds at most `images_per_row`.

On disk a split is a folder of ArrayRecord shards and one `manifest.json`. A record is one example: its columns one
after the other, little-endian, without header, so that an example is read with one seek and no parsing. Pictures come
last, as the encoded files that they were (`join_images`). The manifest lists the columns; it is written last, so a
folder with a manifest is complete.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from qwen_jax import files
from qwen_jax.data import packed_index
from qwen_jax.data.packed_index import PackedIndex
from qwen_jax.data.packers import Document, Fitted, Removed, add_removed, best_fit, fit, pack, padded, terminated, whole

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# One record a group: reading an example never decompresses another.
WRITER_OPTIONS = "group_size:1,zstd:3"


def document_key(document: Document, seed: int) -> bytes:
    """16 bytes that order a document among all others: a hash of seed and content.

    It depends neither on the file that the document came from nor on the machine. Only equal documents have equal
    keys, and their order among each other cannot be seen.
    """
    digest = hashlib.blake2b(digest_size=16, key=f"pack:{seed}".encode())
    digest.update(np.ascontiguousarray(document.tokens, "<i4").tobytes())
    digest.update(document.weights().tobytes())
    for name, numbers in (("segments", document.segment_lengths), ("ends", document.ends)):
        if numbers is not None:
            digest.update(name.encode() + np.ascontiguousarray(numbers, "<i4").tobytes())
    if document.images:
        digest.update(b"images" + join_images(document.images))
    digest.update(document.left_out.encode())
    return digest.digest()


def shard_of(key: bytes, num_shards: int) -> int:
    """The shard, in [0, num_shards), that the document with this key belongs to."""
    return int.from_bytes(key[:8], "little") % num_shards


PACKINGS = {"concat": pack, "best_fit": best_fit, "whole": whole, "padded": padded}
# These take documents as they are, without end-of-text, and an example holds each of them whole.
_WHOLE = ("whole", "padded")


def check_packing(name: str) -> str:
    """Returns `name`, a key of `PACKINGS`.

    Raises:
        ValueError: there is no such packing.
    """
    if name not in PACKINGS:
        raise ValueError(f"packing is {name!r}: it must be one of {', '.join(PACKINGS)}")
    return name


def keeps_documents(name: str) -> bool:
    """Whether `name` takes documents as they are, ends none with end-of-text, and counts those that do not fit."""
    return check_packing(name) in _WHOLE


def has_segments(name: str) -> bool:
    """Whether examples packed by `name` have the columns `segment_ids` and `positions`."""
    return check_packing(name) != "concat"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a record: `sequence_length` values of `dtype` (a little-endian numpy name such as `uint16`).

    The column `images` of dtype `bytes`, always the last one, has any size (`join_images`).
    """

    name: str
    dtype: str


IMAGES = Column("images", "bytes")


def columns_for(
    vocab_size: int, sequence_length: int, packing: str = "concat", images_per_row: int = 0
) -> tuple[Column, ...]:
    """Columns of an example; ids, segments and positions take two bytes each where that is enough."""
    columns = (Column("tokens", "uint16" if vocab_size <= 1 << 16 else "uint32"), Column("loss_weights", "uint8"))
    if has_segments(packing):
        dtype = "uint16" if sequence_length < 1 << 16 else "uint32"
        columns = (*columns, Column("segment_ids", dtype), Column("positions", dtype))
    return (*columns, IMAGES) if images_per_row else columns


def join_images(images: Sequence[bytes]) -> bytes:
    """Encoded pictures as one string: their number, their sizes, then the pictures; numbers are uint32 ("<u4")."""
    return np.array([len(images), *map(len, images)], "<u4").tobytes() + b"".join(images)


def split_images(joined: bytes) -> list[bytes]:
    """The inverse of `join_images`.

    Raises:
        ValueError: the size is not that of the pictures.
    """
    count = int.from_bytes(joined[:4], "little")
    header = 4 + 4 * count
    ends = header + np.cumsum(np.frombuffer(joined[4:header], "<u4"), dtype=np.int64)
    if len(joined) < header or len(joined) != (ends[-1] if count else header):
        raise ValueError(f"the {len(joined)} bytes of {count} pictures have another size than they say")
    return [joined[start:end] for start, end in zip([header, *ends], ends, strict=False)]


def record_bytes(columns: Sequence[Column], sequence_length: int) -> int:
    """Bytes of one record, without pictures."""
    return sum(np.dtype(column.dtype).itemsize for column in columns if column != IMAGES) * sequence_length


def encode_record(example: Mapping[str, Any], columns: Sequence[Column]) -> bytes:
    """The record of one example: [sequence_length] a column, and `images`, bytes, if there are any."""
    fixed = [c for c in columns if c != IMAGES]
    record = b"".join(example[c.name].astype(np.dtype(c.dtype).newbyteorder("<")).tobytes() for c in fixed)
    return record + join_images(example.get("images", ())) if IMAGES in columns else record


def decode_records(records: Sequence[bytes], columns: Sequence[Column], sequence_length: int) -> dict[str, Any]:
    """Columns of records, each [len(records), sequence_length] in the column's own dtype; `images` a list a record.

    Raises:
        ValueError: the size of a record does not fit the columns.
    """
    size, with_images = record_bytes(columns, sequence_length), IMAGES in columns
    for index, record in enumerate(records):
        if len(record) < size or (len(record) > size and not with_images):
            raise ValueError(f"record {index} has {len(record)} bytes, expected {size}")
    fixed = b"".join(record[:size] for record in records) if with_images else b"".join(records)
    table = np.frombuffer(fixed, np.uint8).reshape(len(records), size)
    result: dict[str, Any] = {IMAGES.name: [split_images(record[size:]) for record in records]} if with_images else {}
    offset = 0
    for column in columns:
        if column == IMAGES:
            continue
        dtype = np.dtype(column.dtype).newbyteorder("<")
        width = dtype.itemsize * sequence_length
        result[column.name] = np.ascontiguousarray(table[:, offset : offset + width]).view(dtype)
        offset += width
    return result


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file and its contents.

    `tokens` counts documents and their end-of-text, not the filling of examples; `loss_tokens` those with loss weight
    1; `text_bytes` is the UTF-8 size of the documents' text after NFC; `file_bytes` the size of the file. `truncated`
    and `left_out` map a reason to the documents and tokens that no example holds (`Fitted`); the documents of
    `truncated` are among `documents`, those of `left_out` are not. `images` counts pictures, and each has
    `image_tokens` places between its tags. `index_sha256` is the SHA-256 of the index beside the file
    (`packed_index`); shards that were packed before there was one have none.
    """

    file: str
    records: int
    tokens: int
    loss_tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    truncated: Removed = dataclasses.field(default_factory=dict)
    left_out: Removed = dataclasses.field(default_factory=dict)
    images: int = 0
    image_tokens: int = 0
    index_sha256: str = ""


# These fields of a shard are written where they are not empty, and the last one is not part of the data's identity.
_OPTIONAL = ("truncated", "left_out", "images", "image_tokens")
_INDEX = "index_sha256"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, for one packed split. Counts over all shards are properties.

    `method` is the packing, a key of `PACKINGS`; None in the files of `concat` and `best_fit`: columns tell them apart.
    `images_per_row` is the most pictures of an example; None: the examples have no column for pictures.
    """

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
    method: str | None = None
    images_per_row: int | None = None

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
    def images(self) -> int:
        """Number of pictures."""
        return sum(shard.images for shard in self.shards)

    @property
    def image_tokens(self) -> int:
        """Places between the tags of each picture; 0 without any."""
        return max((shard.image_tokens for shard in self.shards), default=0)

    @property
    def text_tokens(self) -> int:
        """Number of tokens, without filling, places of pictures and their tags."""
        return sum(shard.tokens - shard.images * (shard.image_tokens + 2) for shard in self.shards)

    @property
    def truncated(self) -> Removed:
        """Reason to documents and tokens, of what was cut off."""
        return _sum(shard.truncated for shard in self.shards)

    @property
    def left_out(self) -> Removed:
        """Reason to documents and tokens, of what no example holds."""
        return _sum(shard.left_out for shard in self.shards)

    @property
    def packing(self) -> str:
        """How documents were packed: a key of `PACKINGS`."""
        segments = any(column.name == "segment_ids" for column in self.columns)
        return self.method or ("best_fit" if segments else "concat")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: the identity of the packed data."""
        fields = self._fields()
        for shard in fields["shards"]:
            shard.pop(_INDEX, None)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _fields(self) -> dict:
        """The fields to write; those that only some packings and pictures need are left out where they are empty."""
        fields = dataclasses.asdict(self)
        fields["shards"] = [
            {name: value for name, value in shard.items() if value or name not in (*_OPTIONAL, _INDEX)}
            for shard in fields["shards"]
        ]
        return {name: value for name, value in fields.items() if value is not None}

    def save(self, folder: Path) -> Path:
        """Writes `folder/manifest.json` atomically."""
        totals = {name: getattr(self, name) for name in ("records", "tokens", "loss_tokens", "documents", "text_bytes")}
        totals |= {name: value for name in _OPTIONAL if (value := getattr(self, name))}
        files.write_json(folder / MANIFEST, {"totals": totals} | self._fields(), sort_keys=True)
        return folder / MANIFEST

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads `folder/manifest.json`.

        Raises:
            FileNotFoundError: the folder has no manifest.
            ValueError: the file is not a manifest of this format version.
        """
        path = files.as_path(folder) / MANIFEST
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


def _sum(counts: Iterable[Removed]) -> Removed:
    total: Removed = {}
    for one in counts:
        for reason, entry in sorted(one.items()):
            add_removed(total, reason, entry["tokens"], entry["documents"])
    return total


def packed_folder(
    cache_dir: str | os.PathLike,
    task: str,
    sequence_length: int,
    split: str,
    packing: str = "concat",
    images_per_row: int = 0,
) -> Path:
    """Folder of the packed examples: `cache_dir/task/packed-<length>/split`.

    The second last name goes on with `-<packing>` unless that is "concat", and with `-images<images_per_row>` unless
    that is 0.
    """
    ending = "" if check_packing(packing) == "concat" else f"-{packing}"
    ending += f"-images{images_per_row}" if images_per_row else ""
    return files.as_path(cache_dir).joinpath(*filter(None, task.split(":")), f"packed-{sequence_length}{ending}", split)


def is_packed(
    mixture_or_task: str,
    *,
    cache_dir: str | os.PathLike,
    sequence_length: int,
    packing: str = "concat",
    images_per_row: int = 0,
    splits: Sequence[str] = ("train", "validation"),
) -> bool:
    """Whether all `splits` of a task have a manifest; False for mixtures, which only SeqIO knows."""
    where = (cache_dir, mixture_or_task, sequence_length)
    folders = (packed_folder(*where, split, packing, images_per_row) for split in splits)
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
    method: str,
    images_per_row: int = 0,
) -> Shard:
    """Sorts documents by key, packs them and writes one ArrayRecord file, which appears only when it is whole.

    Its index is written beside it (`packed_index`).

    Args:
        path: the file; its bytes depend only on the set of documents.
        documents: (key, document) in any order; all are held in memory.
        sequence_length, eos_id: see `pack`.
        columns: the columns to write, of `columns_for`.
        token_bytes: int array [vocab_size], UTF-8 bytes of text that each id stands for (0 for control tokens).
        method: a key of `PACKINGS`.
        images_per_row: the most pictures of an example.

    Raises:
        ValueError: a document has misaligned weights or segments, segments or pictures in a packing that cuts, or
            pictures with another number of places than others.
    """
    ordered = [document for _, document in sorted(spread_copies(documents), key=lambda item: item[0])]
    if keeps_documents(method):
        fitted, options = fit(ordered, sequence_length, images_per_row), {"images_per_row": images_per_row}
    else:
        fitted, options = _terminate_all(ordered, method, eos_id), {}
    image_tokens = _image_tokens(fitted.documents)
    records = 0
    with files.new_file(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for example in PACKINGS[method](fitted.documents, sequence_length=sequence_length, eos_id=eos_id, **options):
            writer.write(encode_record(example, columns))
            records += 1
        writer.close()
        file_bytes, index = temporary.stat().st_size, PackedIndex.of_file(temporary).to_bytes()
        # Before the shard, which is complete with it.
        with files.new_file(path.with_name(path.name + packed_index.SUFFIX)) as temporary_index:
            temporary_index.write_bytes(index)
    return Shard(
        file=path.name,
        records=records,
        tokens=sum(len(document.tokens) for document in fitted.documents),
        loss_tokens=sum(int(document.weights().sum()) for document in fitted.documents),
        documents=len(fitted.documents),
        text_bytes=sum(int(token_bytes[document.tokens].sum()) for document in fitted.documents),
        file_bytes=file_bytes,
        truncated=fitted.truncated,
        left_out=fitted.left_out,
        images=sum(len(document.images) for document in fitted.documents),
        image_tokens=image_tokens,
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _image_tokens(documents: Iterable[Document]) -> int:
    """Places between the tags of each picture; 0 without pictures."""
    spans = [document.image_spans for document in documents if document.images]
    found = {int(end - start) - 2 for one in spans if one is not None for start, end in one}
    if len(found) > 1:
        raise ValueError(
            f"pictures have {' and '.join(map(str, sorted(found)))} places for features: a task must give each as many "
            "as the model has queries"
        )
    return found.pop() if found else 0


def _terminate_all(documents: Iterable[Document], method: str, eos_id: int) -> Fitted:
    """The documents, each ended by `eos_id`; those for which the task gives no tokens are counted."""
    kept: list[Document] = []
    left_out: Removed = {}
    for document in documents:
        if document.left_out:
            add_removed(left_out, document.left_out, 0)
        elif document.segment_lengths is not None or document.ends is not None or document.images:
            raise ValueError(
                f"conversations, pairs, prompts and documents with pictures cannot be packed by {method!r}, which cuts "
                "documents and ends them with <|endoftext|>: pack them by 'whole' (--packing=whole, PACKING = "
                "'whole'), or prompts by 'padded'"
            )
        else:
            kept.append(Document(*terminated(document, eos_id)))
    return Fitted(kept, {}, left_out)
