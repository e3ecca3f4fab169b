"""Files of a curation run: each appears whole under its name or not at all, with the same bytes however it was made."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import zstandard

_LEVEL = 6


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed when it does not.

    Where two workers make the same folder, the first one stays: they are equal.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `final` when the block ends well."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed run left half-written directly in `folder`."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """A .npy file, mapped into memory so that only what is looked at is read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)  # an array without elements cannot be mapped


def save_json(path: Path, value: object) -> None:
    """Writes JSON that a person can read."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def load_json(path: Path):
    """Reads JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


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
    with new_file(destination) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
