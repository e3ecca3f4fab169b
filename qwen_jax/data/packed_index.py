"""Where the records of a packed shard lie in its ArrayRecord file, and their checksums.

The index is a small file beside the shard. With it, a record is one range of an object in a bucket, which is checked
when it comes. The layout of ArrayRecord files, which hold one record a chunk here, is public:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md

    <u8 [records + 1]   offsets of the chunks of records and of what follows them
    <u4 [records]       CRC-32 of the bytes of each chunk
"""

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

SUFFIX = ".index"

# Of every 65,536 bytes of a file the first 24 say where the surrounding chunk begins and ends.
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
# Of a chunk: hash, size of its data, hash of the data, kind (1 byte) and number of records (7), size when decompressed.
_CHUNK = struct.Struct("<QQQQQ")
_PLAIN, _ZSTD = 0, ord("z")


@dataclasses.dataclass(frozen=True)
class PackedIndex:
    """Attributes: `offsets`, int64 [records + 1], and `checksums`, uint32 [records], None where they are not known."""

    offsets: np.ndarray
    checksums: np.ndarray | None

    def span(self, record: int) -> tuple[int, int]:
        """The bytes of one record's chunk."""
        return int(self.offsets[record]), int(self.offsets[record + 1])

    def is_damaged(self, record: int, chunk: bytes) -> bool:
        """Whether these are not the bytes of the record's chunk."""
        return self.checksums is not None and zlib.crc32(chunk) != self.checksums[record]

    def to_bytes(self) -> bytes:
        """The content of the file."""
        assert self.checksums is not None  # of a new shard
        return self.offsets.astype("<u8").tobytes() + self.checksums.astype("<u4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, sha256: str) -> "PackedIndex":
        """The inverse of `to_bytes`.

        Raises:
            ValueError: the data are damaged.
        """
        if hashlib.sha256(data).hexdigest() != sha256 or len(data) % 12 != 8:
            raise ValueError("it has not the checksum of the manifest")
        records = (len(data) - 8) // 12
        offsets = np.frombuffer(data[: 8 * (records + 1)], "<u8").astype(np.int64)
        return cls(offsets, np.frombuffer(data[8 * (records + 1) :], "<u4"))

    @classmethod
    def of_file(cls, path: Path) -> "PackedIndex":
        """Computes the index of a local shard."""
        with path.open("rb") as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            offsets = record_offsets(read, path.stat().st_size)
            pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            checksums = np.array([zlib.crc32(read(start, stop)) for start, stop in pairs], np.uint32)
        return cls(offsets, checksums)


def record_offsets(read: Callable[[int, int], bytes], size: int) -> np.ndarray:
    """Offsets of the chunks of records, and of what follows them, int64 [records + 1], from the end of a shard.

    Args:
        read: gives the bytes [start, stop) of the file.
        size: of the file.

    Raises:
        ValueError: it is no ArrayRecord file of one record a chunk.
    """
    postscript = _records_of(read, max(size - _BLOCK, 0), size)[0]
    footer = _numbers(postscript).get(1, 0)
    first, *chunks = [_numbers(record) for record in _records_of(read, footer, size)]
    offsets = [chunk.get(1, 0) for chunk in chunks]
    if any(chunk.get(3, 1) != 1 for chunk in chunks):
        raise ValueError("it has chunks of several records")
    return np.array([*offsets, footer], np.int64)


def _records_of(read: Callable[[int, int], bytes], start: int, size: int) -> list[bytes]:
    """The records of the chunk that begins at `start`."""
    head = _without_block_headers(read(start, min(start + _CHUNK.size + _BLOCK_HEADER, size)), start)
    data_size, kind, count = _header(head)
    if kind != ord("r"):
        raise ValueError("it is no ArrayRecord file")
    # Each block adds a header.
    whole = _CHUNK.size + data_size
    stop = start + whole + (whole // (_BLOCK - _BLOCK_HEADER) + 2) * _BLOCK_HEADER
    data = _without_block_headers(read(start, min(stop, size)), start)[_CHUNK.size : whole]
    return _split(data, count)


def _header(head: bytes) -> tuple[int, int, int]:
    if len(head) < _CHUNK.size:
        raise ValueError("a chunk is cut off")
    _, data_size, _, kind, _ = _CHUNK.unpack(head[: _CHUNK.size])
    return data_size, kind & 255, kind >> 8


def _without_block_headers(data: bytes, start: int) -> bytes:
    parts, place = [], 0
    while place < len(data):
        if (start + place) % _BLOCK == 0:
            place += _BLOCK_HEADER
        end = place + _BLOCK - (start + place) % _BLOCK
        parts.append(data[place:end])
        place = end
    return b"".join(parts)


def decode_record(chunk: bytes, start: int) -> bytes:
    """The record in the bytes of its chunk, which begin at `start` in the file.

    Raises:
        ValueError: they are no chunk of one record.
    """
    data = _without_block_headers(chunk, start)
    data_size, kind, count = _header(data)
    if kind != ord("r") or count != 1 or len(data) < _CHUNK.size + data_size:
        raise ValueError("it is no chunk of one record")
    return _split(data[_CHUNK.size : _CHUNK.size + data_size], 1)[0]


def _split(data: bytes, count: int) -> list[bytes]:
    """The records in the data of a chunk: their sizes, then their values, both perhaps compressed."""
    compression = data[0]
    length, place = _varint(data, 1)
    sizes, values = data[place : place + length], data[place + length :]
    if compression == _ZSTD:
        sizes, values = _decompress(sizes), _decompress(values)
    elif compression != _PLAIN:
        raise ValueError(f"it has the compression {chr(compression)!r}, which is not written here")
    records, size_place, place = [], 0, 0
    for _ in range(count):
        size, size_place = _varint(sizes, size_place)
        records.append(values[place : place + size])
        place += size
    if place != len(values):
        raise ValueError("the sizes of its records do not sum up")
    return records


def _decompress(data: bytes) -> bytes:
    import zstandard  # here, because only data in buckets need it

    size, place = _varint(data, 0)
    if not size:
        return b""
    try:
        return zstandard.ZstdDecompressor().decompress(data[place:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(f"not readable as Zstandard: {error}") from error


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise ValueError("it is cut off")
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _numbers(message: bytes) -> dict[int, int]:
    """The fields of a protocol buffer that are numbers."""
    found, place = {}, 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 == 0:
            found[tag >> 3], place = _varint(message, place)
        elif tag & 7 == 1:
            place += 8
        elif tag & 7 == 2:
            length, place = _varint(message, place)
            place += length
        else:
            raise ValueError("it is no ArrayRecord file")
    return found
