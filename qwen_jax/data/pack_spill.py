"""Documents on their way from files of SeqIO's cache to the shards that pack them, sorted by shard in files.

A file of the cache becomes some files here, each with all shards in order behind a table of their places, so that a
shard is read with one seek a file. Memory is bounded by what a file holds.

    folder/00003-00000.documents   folder/00003.json, which is written last
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qwen_jax import files

# A document as the byte strings that `pack_cache` makes of it.
Parts = tuple[bytes, ...]

_BYTES_PER_FILE = 1 << 28


def write(folder: Path, number: int, num_shards: int, documents: Iterable[tuple[int, Parts]]) -> None:
    """Writes the documents of one file of the cache.

    Args:
        folder: of all these files.
        number: of the file of the cache.
        num_shards: number of shards.
        documents: (shard, parts); all have as many parts.
    """
    shards: list[list[bytes]] = [[] for _ in range(num_shards)]
    size = written = 0
    for shard, parts in documents:
        shards[shard] += [struct.pack(f"<{len(parts)}I", *map(len, parts)), *parts]
        size += sum(map(len, parts))
        if size >= _BYTES_PER_FILE:
            _write_file(folder / f"{number:05d}-{written:05d}.documents", shards)
            shards = [[] for _ in range(num_shards)]
            size, written = 0, written + 1
    _write_file(folder / f"{number:05d}-{written:05d}.documents", shards)
    files.write_json(folder / f"{number:05d}.json", {"files": written + 1})


def _write_file(path: Path, shards: list[list[bytes]]) -> None:
    ends = np.cumsum([sum(map(len, shard)) for shard in shards], dtype=np.uint64)
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        file.write(ends.astype("<u8").tobytes())
        for shard in shards:
            file.writelines(shard)


def are_written(pieces: Sequence[tuple[Path, int]]) -> list[bool]:
    """Of (folder, number of a file of the cache), whether `write` has finished for each."""
    return files.are_files([folder / f"{number:05d}.json" for folder, number in pieces])


def read(folder: Path, num_files: int, shard: int, num_shards: int, num_parts: int) -> Iterator[Parts]:
    """The documents of one shard from the files of the cache 0 to `num_files` - 1."""
    lengths = struct.Struct(f"<{num_parts}I")
    for number in range(num_files):
        for written in range(files.read_json(folder / f"{number:05d}.json")["files"]):
            segment = _read_segment(folder / f"{number:05d}-{written:05d}.documents", shard, num_shards)
            place = 0
            while place < len(segment):
                sizes = lengths.unpack_from(segment, place)
                place += lengths.size
                parts = []
                for size in sizes:
                    parts.append(segment[place : place + size])
                    place += size
                yield tuple(parts)


def _read_segment(path: Path, shard: int, num_shards: int) -> bytes:
    first = max(shard - 1, 0)
    ends = np.frombuffer(files.read_range(path, 8 * first, 8 * (shard + 1)), "<u8").astype(int).tolist()
    start, end = (0, ends[0]) if shard == 0 else ends
    return files.read_range(path, 8 * num_shards + start, 8 * num_shards + end)
