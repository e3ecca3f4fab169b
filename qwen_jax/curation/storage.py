"""Arrays and compressed JSON lines of a curation run: the same bytes however they were made."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import zstandard

from qwen_jax import files

_LEVEL = 6


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """A .npy file, mapped into memory so that only accessed parts are read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)  # an array without elements cannot be mapped


class LineWriter:
    """Writes JSON lines, compressed by Zstandard; the file is made when the first line comes."""

    def __init__(self, path: Path):
        self._path, self._file, self.lines = path, None, 0

    def write(self, row: Mapping) -> None:
        """Adds a line."""
        if self._file is None:
            self._raw = self._path.open("wb")
            self._file = zstandard.ZstdCompressor(level=_LEVEL).stream_writer(self._raw, closefd=True)
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.lines += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> Iterator[dict]:
    """Rows that a `LineWriter` wrote; none if there is no such file."""
    if not path.exists():
        return
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)


def place(source: Path, destination: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    with files.new_file(destination) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
