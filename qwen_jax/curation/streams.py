"""Contents of plain, gzip and Zstandard files as a stream that survives damage and knows where each byte came from.

A damaged gzip member or Zstandard frame costs that member or frame: the stream shows the damage as a `Gap` and goes on
at the next one. Positions in the file are exact for plain files and at the ends of members and frames, and
interpolated inside them.
"""

import dataclasses
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import zstandard

_CHUNK = 1 << 20
_GZIP_INPUT = 1 << 14
# A Zstandard block of a few bytes can stand for 128 KiB, and the library has no limit for the result of one call.
_ZSTD_INPUT = 1 << 10
_SALVAGE_INPUT = 1 << 10
# RFC 8878 lets a decoder refuse windows over 8 MiB; `zstd --long=31` writes up to this.
_MAX_WINDOW = 1 << 31
# How far a decompressor may read past the end of a damaged member before it notices.
_OVERRUN = 1 << 20
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
# Of a WARC file: a skippable frame with the dictionary of the frames after it (IIPC, "Zstandard compression in WARC").
_DICTIONARY = b"\x5d\x2a\x4d\x18"
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


class Data(NamedTuple):
    """Bytes of the contents, which stand in the file from `start` to `end`."""

    content: bytes
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of the file that cannot be decompressed.

    Attributes:
        end: position in the file where reading goes on.
        reason: message of the library.
        poisons: whether the contents just before it belong to the same damaged member.
    """

    end: int
    reason: str
    poisons: bool


class Stream:
    """A window on the contents of a file: `data` holds the bytes from the current position on.

    Reading stops at a gap: `fill` returns False, and `gap` is set until `pass_gap` is called.
    """

    def __init__(self, file: BinaryIO, name: str):
        """`file`: a file that can seek; `name`: tells gzip and Zstandard by suffix where the first bytes do not."""
        self.data = bytearray()
        self.gap: Gap | None = None
        self._pieces = _pieces(file, name.lower())
        self._place = 0  # of data[0] in the contents
        self._marks: deque[tuple[int, int, int]] = (
            deque()
        )  # end of a piece in the contents; its start and end in the file
        self._passed = 0  # position in the file before the first mark
        self._first = 0  # place in the contents where the first mark begins

    def fill(self, size: int | None = None) -> bool:
        """Reads on: one piece, or until `data` holds `size` bytes. False where a gap or the end comes before."""
        if size is not None:
            while len(self.data) < size:
                if not self.fill():
                    return False
            return True
        if self.gap is not None:
            return False
        piece = next(self._pieces, None)
        if isinstance(piece, Gap):
            self.gap = piece
        if not isinstance(piece, Data):
            return False
        self.data += piece.content
        self._marks.append((self._place + len(self.data), piece.start, piece.end))
        return True

    def drop(self, size: int) -> None:
        """Moves on by `size` bytes of `data`."""
        del self.data[:size]
        self._place += size
        while self._marks and self._marks[0][0] <= self._place:
            self._first, _, self._passed = self._marks.popleft()

    def pass_gap(self) -> Gap:
        """Moves past the gap, and drops the rest of `data` before it."""
        gap, self.gap = self.gap, None
        assert gap is not None  # callers look first
        self.drop(len(self.data))
        self._passed = gap.end
        return gap

    @property
    def position(self) -> int:
        """Where `data` begins in the file."""
        if self._place == self._first or not self._marks:
            return self._passed
        last, start, end = self._marks[0]
        return start + (end - start) * (self._place - self._first) // (last - self._first)

    def skip(self, characters: bytes) -> bool:
        """Moves past any of `characters`; False where a gap or the end comes next."""
        while True:
            end = 0
            while end < len(self.data) and self.data[end] in characters:
                end += 1
            self.drop(end)
            if self.data:
                return True
            if not self.fill():
                return False

    def line(self, limit: int) -> tuple[bytes, int]:
        """The next line with its end, and its length; of a line longer than `limit` only the length, and no bytes."""
        searched = size = 0
        while True:
            end = self.data.find(b"\n", searched) + 1
            if not end:
                searched = len(self.data)
                if size or searched > limit:
                    size += searched
                    self.drop(searched)
                    searched = 0
                if self.fill():
                    continue
                end = len(self.data)
            size += end
            line = bytes(self.data[:end]) if size == end <= limit else b""
            self.drop(end)
            return line, size


def _pieces(file: BinaryIO, name: str) -> Iterator[Data | Gap]:
    head = file.read(512)
    file.seek(0)
    if head.startswith(GZIP_MAGIC):
        return _gzip(file)
    if head.startswith(ZSTD_MAGIC) or _SKIPPABLE.match(head):
        return _zstandard(file)
    # A download that the server or client unpacked keeps its name.
    if name.endswith(".gz") and _CONTROL.search(head):
        return _gzip(file)
    if name.endswith(".zst") and _CONTROL.search(head):
        return _zstandard(file)
    return _plain(file)


def _plain(file: BinaryIO) -> Iterator[Data]:
    position = 0
    while content := file.read(_CHUNK):
        yield Data(content, position, position + len(content))
        position += len(content)


def _gzip(file: BinaryIO) -> Iterator[Data | Gap]:
    data, position, shown = b"", 0, 0
    while True:
        if len(data) < 18:  # the shortest member has 20 bytes
            data += file.read(_GZIP_INPUT)
        if not data:
            return
        if not data.strip(b"\0"):  # padding, as of tapes
            position += len(data)
            data = b""
            continue
        if not data.startswith(GZIP_MAGIC):
            position = shown = _next_member(file, position + 1, _GZIP_START)
            yield Gap(position, "no gzip member", poisons=False)
            data = b""
            continue
        begin, inflate, size = position, zlib.decompressobj(wbits=31), 0
        while not inflate.eof:
            last = not data and not (data := file.read(_GZIP_INPUT))
            try:
                content = inflate.decompress(data, _CHUNK)
            except zlib.error as error:
                content, damage = _before_damage(file, begin, size)
                if content:
                    yield Data(content, shown, max(shown, damage))
                position = max(begin + 10, position - _OVERRUN)
                position = shown = _next_member(file, position, _GZIP_START)
                yield Gap(position, str(error), poisons=bool(size or content))
                data = b""
                break
            rest = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            position += len(data) - len(rest)
            data = rest
            if content:
                yield Data(content, shown, position)
                shown, size = position, size + len(content)
            elif last and not inflate.eof:
                yield Gap(position, "cut off within a gzip member", poisons=size > 0)
                return


def _before_damage(file: BinaryIO, begin: int, size: int) -> tuple[bytes, int]:
    """Contents of a damaged gzip member from `size` on, up to the first byte that zlib refuses, and its position.

    zlib gives nothing back from the call that meets the damage, so this one goes byte by byte at the end.
    """
    file.seek(begin)
    inflate, position, place, contents = zlib.decompressobj(wbits=31), begin, 0, bytearray()

    def add(content: bytes) -> None:
        nonlocal place
        contents.extend(content[max(0, size - place) :])
        place += len(content)

    while data := file.read(_SALVAGE_INPUT):
        before = inflate.copy()
        try:
            content = inflate.decompress(data)
        except zlib.error:
            for number in range(len(data)):
                try:
                    add(before.decompress(data[number : number + 1]))
                except zlib.error:
                    break
                position += 1
            break
        add(content)
        position += len(data)
    return bytes(contents), position


def _zstandard(file: BinaryIO) -> Iterator[Data | Gap]:
    dictionary = _dictionary(file)
    data, position, shown = b"", 0, 0
    while True:
        if len(data) < 8:
            data += file.read(_ZSTD_INPUT)
        if not data:
            return
        if _SKIPPABLE.match(data) and len(data) >= 8:
            position += 8 + int.from_bytes(data[4:8], "little")
            size = file.seek(0, os.SEEK_END)
            if position > size:
                yield Gap(size, "cut off within a skippable frame", poisons=False)
                return
            file.seek(position)
            data = b""
            continue
        if not data.startswith(ZSTD_MAGIC):
            position = shown = _next_member(file, position + 1, _ZSTD_START)
            yield Gap(position, "no Zstandard frame", poisons=False)
            data = b""
            continue
        begin, size = position, 0
        frame = zstandard.ZstdDecompressor(dictionary, max_window_size=_MAX_WINDOW).decompressobj()
        while not frame.eof:
            if not data and not (data := file.read(_ZSTD_INPUT)):
                yield Gap(position, "cut off within a Zstandard frame", poisons=size > 0)
                return
            try:
                content = frame.decompress(data[:_ZSTD_INPUT])
            except zstandard.ZstdError as error:
                position = max(begin + 4, position - _OVERRUN)
                position = shown = _next_member(file, position, _ZSTD_START)
                yield Gap(position, str(error), poisons=size > 0)
                data = b""
                break
            rest = (frame.unused_data if frame.eof else b"") + data[_ZSTD_INPUT:]
            position += len(data) - len(rest)
            data = rest
            if content:
                yield Data(content, shown, position)
                shown, size = position, size + len(content)


def _dictionary(file: BinaryIO) -> zstandard.ZstdCompressionDict | None:
    """The dictionary in the first frame of a compressed WARC file; leaves `file` at its start."""
    head = file.read(8)
    content = file.read(int.from_bytes(head[4:], "little")) if head.startswith(_DICTIONARY) else b""
    file.seek(0)
    if content.startswith(ZSTD_MAGIC):
        try:
            content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
        except zstandard.ZstdError:
            return None
    return zstandard.ZstdCompressionDict(content) if content else None


# Flags, time, how hard it was compressed, operating system: RFC 1952 leaves few values.
_GZIP_START = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)
_ZSTD_START = re.compile(re.escape(ZSTD_MAGIC))


def _next_member(file: BinaryIO, position: int, start: re.Pattern[bytes]) -> int:
    """Position of the next member or frame from `position` on, or the size of the file; leaves `file` there."""
    while True:
        file.seek(position)
        data = file.read(_CHUNK)
        for found in start.finditer(data):
            if start is _GZIP_START or _is_frame(data[found.start() : found.start() + 18]):
                return file.seek(position + found.start())
        if len(data) < _CHUNK:
            return file.seek(position + len(data))
        position += len(data) - 18


def _is_frame(head: bytes) -> bool:
    try:
        return zstandard.get_frame_parameters(head).window_size <= _MAX_WINDOW
    except zstandard.ZstdError:
        return False
