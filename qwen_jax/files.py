"""Files and folders that appear whole or not at all, locks on folders, JSON and JSON lines.

Every file that qwen_jax writes goes through this module, so that a reader never sees half of one and a killed process
leaves nothing but hidden temporary names, which `remove_unfinished` clears.
"""

import codecs
import contextlib
import errno
import fcntl
import gzip
import io
import json
import logging
import os
import shutil
import socket
import uuid
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, get_args

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Types of parameters for a path, or for a folder or glob: on the command line, their values are never read as numbers.
# The mark is for `is_path_type`.
_PATH_MARK = "qwen_jax path"
PathLike = Annotated[str | os.PathLike, _PATH_MARK]
Pattern = Annotated[str | os.PathLike, _PATH_MARK]


def is_path_type(hint) -> bool:
    """Whether a type annotation is `PathLike` or `Pattern`, or has one of them in it, as `PathLike | None`."""
    return _PATH_MARK in getattr(hint, "__metadata__", ()) or any(map(is_path_type, get_args(hint)))


def as_path(given: PathLike, name: str = "path") -> Path:
    """The path that a person gave, with `~` and `~user` for home folders.

    Args:
      name: name of the flag, macro or parameter in the message.

    Raises:
      ValueError: `given` is no path (a number of a gin file without quotes, nothing), or there is no such user.
    """
    return Path(as_pattern(given, name))


def as_pattern(given: Pattern, name: str = "path") -> str:
    """As `as_path`, for a folder or glob; only the home folder is replaced."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        shown = "nothing" if given == "" else f"{given!r} ({type(given).__name__})"
        raise ValueError(f"{name}: expected a path, found {shown}; in gin files and Python, a path stands in quotes")
    text = os.path.expanduser(os.fspath(given))
    if text.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{name}: {text}: there is no home folder {user}; write ./{text} for a folder of that name")
    return text


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def new_file(final: str | os.PathLike) -> Generator[Path]:
    """A temporary path beside `final`, which is renamed to `final` when the block ends without an error."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
    try:
        yield temporary
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(final: str | Path) -> Generator[Path]:
    """A temporary folder that becomes `final` when the block ends without an error, and is removed otherwise.

    Where two workers make the same folder, the first one stays: they are equal.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
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


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes the temporary files and folders that a killed process left directly in `folder`.

    Args:
      name: final name of the file or folder; by default any.
    """
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 32}.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8; a reader sees the old content or the new one, never a part."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Writes JSON in UTF-8, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def read_json(path: str | Path):
    """The value of a JSON file in UTF-8; a byte order mark is ignored."""
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def read_json_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each line of a file of JSON lines; the place is `FILE:LINE`, and lines count from 1.

    The line feed alone ends a line: U+2028, U+0085 and carriage returns may stand in a value or around it. Blank lines
    and a byte order mark at the start are ignored. Files named `.gz` or `.zst` are decompressed.

    Raises:
      OSError: the file cannot be opened.
      ValueError: a line is not JSON in UTF-8, or the file is damaged. The message names file and line.
    """
    number = 0
    with open_decompressed(path) as lines:
        while True:
            try:
                line = lines.readline()
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read past line {number}: {error}") from error
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}:{number}", _json_value(line, f"{path}:{number}")


def read_json_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each row of a file: of JSON lines, or of a file `.json` that holds one array.

    Publishers give JSON lines the suffix `.json` too, so the first character decides. The place of an item of an array
    is `FILE: item N`, from 0.

    Raises:
      OSError, ValueError: as `read_json_lines`.
    """
    if str(path).lower().endswith(".json"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            is_array = file.read(4096).lstrip().startswith("[")
        if is_array:
            try:
                rows = read_json(path)
            except ValueError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
            yield from ((f"{path}: item {index}", row) for index, row in enumerate(rows))
            return
    yield from read_json_lines(path)


def _json_value(line: bytes, where: str):
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def open_decompressed(path: str | Path) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if its name ends in `.gz` or `.zst` in any case.

    A compressed file that is cut off raises EOFError when its end is read.
    """
    name = str(path).lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), 1 << 20)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The frames of a Zstandard file, one after the other; the library's own reader takes a cut for the end."""

    _LARGEST_WINDOW = 1 << 31  # what `zstd --ultra --long=31` writes

    def __init__(self, path: str | Path):
        import zstandard  # here, because a machine that only trains may lack it

        self._library, self._frame, self._rest, self._ready = zstandard, None, b"", b""
        self._file = open(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            while not self._ready:
                data = self._rest or self._file.read(1 << 16)
                if not data:
                    if self._frame is not None:
                        raise EOFError("cut off within a frame")
                    return 0
                if self._frame is None:
                    decompressor = self._library.ZstdDecompressor(max_window_size=self._LARGEST_WINDOW)
                    self._frame = decompressor.decompressobj()
                self._ready, self._rest = self._frame.decompress(data), b""
                if self._frame.eof:
                    self._rest, self._frame = self._frame.unused_data, None
        except self._library.ZstdError as error:
            raise OSError(f"not readable as Zstandard: {error}") from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def copy_file(source: str | Path, final: str | Path) -> None:
    """Copies a file; the copy appears whole or not at all."""
    with new_file(final) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def locked(folder: str | Path, file: str = LOCK_FILE) -> Generator[None]:
    """Holds `folder`, which is made if missing, for this process; the lock of a killed process is released.

    Args:
      file: name of the lock file in `folder`.

    Raises:
      ValueError: another process holds it; the message names that process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / file, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                lock.seek(0)
                raise ValueError(
                    f"{folder} is in use by {lock.read().strip() or 'another process'}: wait for it, or choose another "
                    f"folder"
                ) from error
            log.warning("%s is on a file system without locks (%s): start one job at a time in it", folder, error)
        else:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        yield
