"""Reading: JSON, JSON lines, compressed files, and objects of buckets as files."""

import codecs
import concurrent.futures
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from . import objects
from .paths import PathLike, RemotePath, as_path, is_remote

_OPENED_AHEAD = 6  # of 4 MiB each
_begun: dict[Path, concurrent.futures.Future[BinaryIO]] = {}
_beginning = concurrent.futures.ThreadPoolExecutor(_OPENED_AHEAD, "reading ahead")


def begin_reading(paths: Sequence[Path]) -> None:
    """Reads the first blocks of objects beside the work, for `open_file` to find them; forgets those begun before.

    Each is read as it is now: who is done, or gives up, begins nothing (`[]`), so that nobody finds it later. Local
    files, and what cannot be read, are left to `open_file`.
    """
    for path in list(_begun):
        if path not in paths and (file := take_begun(path)) is not None:
            file.close()
    for path in paths[:_OPENED_AHEAD]:
        if is_remote(path) and path not in _begun:
            _begun[path] = _beginning.submit(_opened, path)


def take_begun(path: Path) -> BinaryIO | None:
    """The file that `begin_reading` has opened, once; None where it has not, or could not."""
    begun = _begun.pop(path, None)
    if begun is None:
        return None
    try:
        return begun.result()
    except Exception:  # it is met again, by who wants to read
        return None


def _opened(path: Path) -> BinaryIO:
    file = io.BufferedReader(RemoteFile(cast(RemotePath, path)), RemoteFile.BLOCK)
    file.peek(1)
    return file


def open_file(path: PathLike, mode: str = "rb"):
    """A file opened for reading; an object of a bucket is read in blocks, the next one ahead, and can be sought in.

    All of it is read from one version of the object.

    Raises:
      FileNotFoundError: there is none.
      ObjectChangedError: on a read, the object was replaced in the meantime.
    """
    return as_path(path).open(mode)


def opened_in_turn(paths: Sequence[Path]) -> Generator[tuple[Path, BinaryIO]]:
    """Each file with its path, opened for reading, then closed; the first blocks of the next objects are read ahead.

    Raises:
      FileNotFoundError, OSError: in the turn of a file, as `open_file`.
    """
    try:
        for number, path in enumerate(paths):
            begin_reading(paths[number : number + _OPENED_AHEAD])
            with path.open("rb") as file:
                yield path, file
    finally:
        begin_reading([])


def read_range(path: PathLike, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file; one request to a bucket.

    Raises:
      OSError: the file ends before `stop`.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        return objects.get(path, (start, stop))
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise OSError(f"{path}: expected bytes {start:,} to {stop:,}, the file gave {len(data):,} of them")
    return data


def read_ranges(path: PathLike, spans: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of several spans [start, stop) of a file, which a bucket is asked for at the same time.

    Raises:
      OSError: as `read_range`.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        found = objects.get_many(path, spans)
        for (start, stop), data in zip(spans, found, strict=True):
            if len(data) != stop - start:
                raise OSError(f"{path}: expected bytes {start:,} to {stop:,}, the object gave {len(data):,} of them")
        return found
    return [read_range(path, *span) for span in spans]


class RemoteFile(io.RawIOBase):
    """An object of a bucket as a raw file: reads one block per request, the first as it is opened, the next ahead."""

    BLOCK = 4 << 20

    def __init__(self, path: RemotePath, block: int = BLOCK):
        """Looks the object up; later reads are of that version.

        Raises:
          FileNotFoundError: there is none.
        """
        self._path, self._block, self._position = path, block, 0
        found, self._begun = objects.open_object(path, block)
        self._size, self._e_tag = found["size"], found["e_tag"]
        self._ahead: dict[int, concurrent.futures.Future[bytes]] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._path}: negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        start = self._position
        stop = min(start + len(buffer), self._size)
        if start >= stop:
            return 0
        waiting = self._ahead.pop(start, None)
        in_order, self._ahead = waiting is not None, {}
        data = waiting.result() if waiting is not None else self._fetch(start, stop)
        data = data[: stop - start]
        buffer[: len(data)] = data
        self._position = start + len(data)
        if (in_order or start == 0) and self._position < self._size:
            self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(1)
            end = min(self._position + self._block, self._size)
            self._ahead = {self._position: self._pool.submit(self._fetch, self._position, end)}
        return len(data)

    def readall(self) -> bytes:
        """The rest of the object, several blocks at a time."""
        first, self._position = self._position, self._size
        spans = [(one, min(one + objects.PART, self._size)) for one in range(first, self._size, objects.PART)]
        return b"".join(objects.in_parallel(lambda span: self._fetch(*span), spans))

    def _fetch(self, start: int, stop: int) -> bytes:
        begun, self._begun = self._begun, None
        if begun is not None and (start, stop) == (0, min(self._block, self._size)):
            # An answer that breaks off is asked for again.
            with contextlib.suppress(Exception):
                if len(data := begun()) == stop:
                    return data
        return objects.get(self._path, (start, stop), self._e_tag)

    def close(self) -> None:
        if not self.closed and self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def read_json(path: PathLike):
    """The value of a JSON file in UTF-8; a byte order mark is ignored.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, or nests too deeply.
    """
    text = as_path(path).read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON: it nests too deeply") from error


def read_json_lines(path: PathLike) -> Iterator[tuple[str, object]]:
    """(place, value) of each line of a file of JSON lines; the place is `FILE:LINE`, and lines count from 1.

    The line feed alone ends a line: U+2028, U+0085 and carriage returns may stand in a value or around it. Blank lines
    and a byte order mark at the start are ignored. Files named `.gz` or `.zst` are decompressed.

    Raises:
      OSError: the file cannot be opened; or it is in a bucket, which may have refused an answer.
      ValueError: a line is not JSON in UTF-8, or the file is damaged. The message names file and line.
    """
    number = 0
    with open_decompressed(path) as lines:
        while True:
            try:
                line = lines.readline()
            except (EOFError, OSError, zlib.error) as error:
                kind = OSError if is_remote(path) and isinstance(error, OSError) else ValueError
                raise kind(f"{path}: cannot be read past line {number}: {error}") from error
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}:{number}", _json_value(line, f"{path}:{number}")


def read_json_rows(path: PathLike) -> Iterator[tuple[str, object]]:
    """(place, value) of each row of a file: of JSON lines, or of a file `.json` that holds one array.

    Publishers give JSON lines the suffix `.json` too, so the first character decides. The place of an item of an array
    is `FILE: item N`, from 0.

    Raises:
      OSError, ValueError: as `read_json_lines`.
    """
    if str(path).lower().endswith(".json"):
        with as_path(path).open(encoding="utf-8-sig", errors="replace") as file:
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


def open_decompressed(path: PathLike) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if its name ends in `.gz` or `.zst` in any case.

    A compressed file that is cut off raises EOFError when its end is read.
    """
    name = str(path).lower()
    if name.endswith(".gz"):
        return gzip.open(_compressed(path), "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), 1 << 20)
    return open_file(path)


def _compressed(path: PathLike):
    """What the gzip module opens: a local name, or an open object, which it does not close itself."""
    return open_file(path) if is_remote(path) else path


class _Zstandard(io.RawIOBase):
    """The frames of a Zstandard file, one after the other; the library's own reader takes a cut for the end."""

    _LARGEST_WINDOW = 1 << 31  # what `zstd --ultra --long=31` writes

    def __init__(self, path: PathLike):
        import zstandard  # here, because a machine that only trains may lack it

        self._library, self._frame, self._rest, self._ready = zstandard, None, b"", b""
        self._file = open_file(path)

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
