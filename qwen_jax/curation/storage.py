"""Arrays and compressed JSON lines of a curation run: the same bytes however they were made.

They lie on a file system or in a bucket, from which no more is read than asked for.
"""

import collections
import functools
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from qwen_jax import files

_LEVEL = 6
_HEADER = 128  # bytes of the header of a .npy file of few dimensions
# Objects of so many bytes are read whole when a row is asked for: other rows will be, too.
_SMALL = 1 << 20
_KEPT_BYTES = 1 << 28
# NumPy reads headers by ast.literal_eval, which fails now and then in several threads of one Python 3.11.
_ONE_HEADER = threading.Lock()


class _Kept:
    """Arrays of objects by path: those that were used last, together of at most `limit` bytes."""

    def __init__(self, limit: int):
        self._limit, self._bytes, self._lock = limit, 0, threading.Lock()
        self._arrays: collections.OrderedDict[Path, np.ndarray] = collections.OrderedDict()

    def get(self, path: Path) -> np.ndarray | None:
        with self._lock:
            if path in self._arrays:
                self._arrays.move_to_end(path)
            return self._arrays.get(path)

    def put(self, path: Path, array: np.ndarray) -> None:
        with self._lock:
            self._drop(path)
            self._arrays[path] = array
            self._bytes += array.nbytes
            while self._bytes > self._limit:
                self._drop(next(iter(self._arrays)))

    def clear(self) -> None:
        with self._lock:
            self._arrays.clear()
            self._bytes = 0

    def _drop(self, path: Path) -> None:
        if path in self._arrays:
            self._bytes -= self._arrays.pop(path).nbytes


# A few arrays of each unit are asked for again and again.
_kept = _Kept(_KEPT_BYTES)
_values: dict[Path, Any] = {}  # of the JSON of a run


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    keep_array(path, array)


def keep_array(path: Path, array: np.ndarray) -> None:
    """Lets `load_array` give what is being written to an object, instead of reading it again; nobody may change it."""
    if files.is_remote(path):
        _kept.put(path, array)


def load_array(path: Path) -> np.ndarray:
    """A .npy file: a local one mapped into memory so that only accessed parts are read, an object read whole, once."""
    if files.is_remote(path):
        return _remote_array(path)
    with _ONE_HEADER:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            return np.load(path, allow_pickle=False)  # an array without elements cannot be mapped


def save_json(path: Path, value: object) -> None:
    """Writes a JSON file."""
    files.write_json(path, value, sort_keys=True)
    if files.is_remote(path):
        _values[path] = json.loads(json.dumps(value, sort_keys=True))  # as it is read


def load_json(path: Path) -> Any:
    """The value of a JSON file; an object is read once, or not at all where this process wrote it."""
    if not files.is_remote(path):
        return files.read_json(path)
    if path not in _values:
        _values[path] = files.read_json(path)
    return _values[path]


_run = ""


def keep_objects_of(run: str) -> None:
    """Forgets what was read of objects, unless in the same run: another may have others under the same names."""
    global _run
    if run != _run:
        _remote_shape.cache_clear()
        _values.clear()
        _kept.clear()
        _run = run


def _remote_array(path: Path) -> np.ndarray:
    array = _kept.get(path)
    if array is None:
        data = io.BytesIO(path.read_bytes())
        with _ONE_HEADER:
            array = np.load(data, allow_pickle=False)
        _kept.put(path, array)
    return array


def load_row(path: Path, row: int) -> np.ndarray:
    """One row of a .npy file of two dimensions; of a large object, nothing else is read."""
    if not files.is_remote(path):
        return load_array(path)[row]
    if (kept := _kept.get(path)) is not None:
        return kept[row]
    rows, width, dtype, start = _remote_shape(path)
    size = width * dtype.itemsize
    if rows * size <= _SMALL:
        return _remote_array(path)[row]
    return np.frombuffer(files.read_range(path, start + row * size, start + (row + 1) * size), dtype)


@functools.lru_cache(maxsize=4096)
def _remote_shape(path: Path) -> tuple[int, int, np.dtype, int]:
    """Rows, columns, type and place of the values of a .npy file of two dimensions."""
    head = io.BytesIO(files.read_range(path, 0, _HEADER))
    with _ONE_HEADER:
        np.lib.format.read_magic(head)
        (rows, width), _, dtype = np.lib.format.read_array_header_1_0(head)
    return rows, width, dtype, head.tell()


def load_slices(path: Path, slices: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Elements [start, stop) of a file of uint32 without a header, for each slice."""
    if files.is_remote(path):
        spans = [(4 * start, 4 * stop) for start, stop in slices]
        return [np.frombuffer(data, np.uint32) for data in files.read_ranges(path, spans)]
    if not path.stat().st_size:
        return [np.zeros(0, np.uint32) for _ in slices]
    values = np.memmap(path, np.uint32, "r")
    return [values[start:stop] for start, stop in slices]


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
    try:
        raw = path.open("rb")
    except FileNotFoundError:
        return
    with raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)


def place(source: Path, destination: Path) -> None:
    """Gives a file a second name, or copies it where there are no hard links."""
    if files.is_remote(source) or files.is_remote(destination):
        files.copy_file(source, destination)
        return
    with files.new_file(destination) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
