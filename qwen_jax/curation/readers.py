"""Records of a corpus as crawlers and others left it: WARC, HTML, text, JSON lines and Parquet.

Nothing here is fatal for a run: what cannot be read comes as a record with a `problem`, is counted and reported. A file
is read as a stream, and no record larger than a limit is ever held in memory.
"""

import dataclasses
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

WARC_SUFFIXES = (".warc", ".warc.gz")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*WARC_SUFFIXES, *HTML_SUFFIXES, *TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
_URL_FIELDS = ("url", "uri", "link")
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_MAGIC = {True: b"\x1f\x8b\x08", False: b"WARC/1."}


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        payload: a page or text in bytes, or text that needs no decoding.
        url: where it is from; the path for files that do not say.
        is_html: whether text must be extracted.
        charset: of the HTTP header, for bytes.
        problem: why there is no payload, or None.
        size: bytes of the payload, or of what was skipped where that is known.
    """

    payload: bytes | str
    url: str
    is_html: bool = False
    charset: str | None = None
    problem: str | None = None
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A named part of the corpus.

    Attributes:
        name: in ids, folders of the output and weights.
        base: folder that paths in ids are relative to.
        files: with sizes in bytes, in order.
    """

    name: str
    base: str
    files: tuple[tuple[str, int], ...]


def list_source(name: str, patterns: Sequence[str]) -> Source:
    """Files of a source: a folder (all files with one of `SUFFIXES`, hidden ones left out) or a glob, or several.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a glob matches a file whose suffix says nothing about its format, or the name cannot be a folder.
    """
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ValueError(f"source {name!r}: its name becomes a folder, so use letters, digits, '-', '_' and '.'")
    found = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            matches = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
            files = [path for path in matches if path.lower().endswith(SUFFIXES) and os.path.isfile(path)]
        else:
            files = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
            unknown = sorted(path for path in files if not path.lower().endswith(SUFFIXES))
            if unknown:
                raise ValueError(f"{unknown[0]}: unknown suffix; a corpus has files of {', '.join(SUFFIXES)}")
        if not files:
            raise FileNotFoundError(
                f"source {name!r}: no file matches {pattern!r} (seen from {os.getcwd()}): expected a folder or glob "
                f"with files of {', '.join(SUFFIXES)}"
            )
        found.update(os.path.abspath(path) for path in files)
    base = os.path.commonpath([os.path.dirname(path) for path in found])
    return Source(name, base, tuple((path, os.path.getsize(path)) for path in sorted(found)))


def read(path: str, *, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Records of one file, in order. Never raises for what is in the file.

    Args:
        path: a file with one of `SUFFIXES`.
        text_field: field of JSON lines, column of Parquet. A field `html` is taken where it is missing.
        max_bytes: a larger payload is a problem, `too_large`.
    """
    name = path.lower()
    try:
        if name.endswith(WARC_SUFFIXES):
            records = _warc(path, max_bytes)
        elif name.endswith(LINE_SUFFIXES):
            records = _json_lines(path, text_field, max_bytes)
        elif name.endswith(".parquet"):
            records = _parquet(path, text_field, max_bytes)
        else:
            records = _whole(path, name.endswith(HTML_SUFFIXES), max_bytes)
        yield from records
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        # The rest of a damaged file is lost; what came before is kept.
        yield Record(b"", f"{path}: {error}"[:300], problem="unreadable_file")


def _whole(path: str, is_html: bool, max_bytes: int) -> Iterator[Record]:
    size = os.path.getsize(path)
    if size == 0:
        yield Record(b"", path, problem="empty_file")
    elif size > max_bytes:
        yield Record(b"", path, problem="too_large", size=size)
    else:
        yield Record(Path(path).read_bytes(), path, is_html, size=size)


def _json_lines(path: str, text_field: str, max_bytes: int) -> Iterator[Record]:
    if os.path.getsize(path) == 0:
        yield Record(b"", path, problem="empty_file")
        return
    with _open(path) as lines:
        number = 0
        while line := lines.readline(max_bytes + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > max_bytes:
                size = len(line)
                while line and not line.endswith(b"\n"):
                    line = lines.readline(1 << 20)
                    size += len(line)
                yield Record(b"", where, problem="too_large", size=size)
            elif line.strip():
                yield _json_record(line, where, text_field)


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), 1 << 20)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Frames of a file, one after the other. Unlike the library's own reader, it does not take a cut for the end."""

    def __init__(self, path: str):
        self._file, self._frame, self._rest, self._ready = open(path, "rb"), None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._rest or self._file.read(1 << 16)
            if not data:
                if self._frame is not None:
                    raise EOFError("cut off within a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready, self._rest = self._frame.decompress(data), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _json_record(line: bytes, where: str, text_field: str) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Record(b"", where, problem="bad_json", size=len(line))
    return _row(row, where, text_field, len(line))


def _row(row: object, where: str, text_field: str, size: int) -> Record:
    if not isinstance(row, Mapping):
        return Record(b"", where, problem="no_text_field", size=size)
    url = next((row[name] for name in _URL_FIELDS if isinstance(row.get(name), str)), where)
    field = text_field if row.get(text_field) is not None else "html"
    if not isinstance(row.get(field), str):
        return Record(b"", url, problem="no_text_field", size=size)
    return Record(row[field], url, field == "html", size=len(row[field].encode("utf-8", "surrogatepass")))


def _parquet(path: str, text_field: str, max_bytes: int) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path) as table:
        columns = [name for name in (text_field, "html", *_URL_FIELDS) if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                record = _row(row, f"{path}:{number}", text_field, 0)
                if record.size > max_bytes:
                    record = Record(b"", record.url, problem="too_large", size=record.size)
                yield record


def _warc(path: str, max_bytes: int) -> Iterator[Record]:
    """Responses of an archive. After a broken record, reading goes on at what looks like the next one."""
    size = os.path.getsize(path)
    if size == 0:
        yield Record(b"", path, problem="empty_file")
        return
    with open(path, "rb") as file:
        magic = _MAGIC[file.read(2) == b"\x1f\x8b"]
        position, counted = 0, False
        while position is not None and position < size:
            file.seek(position)
            last, seen = 0, False
            try:
                for record in ArchiveIterator(file, parse_http=False, stream_detect=True):
                    last, seen, counted = record.stream_pos, True, False
                    if record.record_type in (
                        WarcRecordType.response,
                        WarcRecordType.resource,
                        WarcRecordType.conversion,
                    ):
                        found = _archived(record, path, max_bytes)
                        counted = found.problem == "broken_record"
                        yield found
                if magic == _MAGIC[True] and _has_more(file, position + last):
                    yield Record(b"", f"{path}: cut off in its last record", problem="broken_record")
                return
            except (OSError, ValueError, RuntimeError) as error:
                if not counted:
                    yield Record(b"", f"{path}: {error}"[:300], problem="broken_record")
                # The search begins behind the last good record, so the next attempt may meet this one again.
                counted = seen
                position = _next(file, magic, position + last + 1)


def _has_more(file: BinaryIO, position: int) -> bool:
    """Whether anything follows the gzip member at `position`, the last one with a whole record: one that is cut off."""
    file.seek(position)
    member = zlib.decompressobj(wbits=31)
    try:
        while chunk := file.read(1 << 20):
            while chunk and not member.eof:
                member.decompress(chunk, 1 << 20)
                chunk = member.unconsumed_tail
            if member.eof:
                return bool(member.unused_data or file.read(1))
    except zlib.error:
        return True
    return False


def _next(file: BinaryIO, magic: bytes, position: int) -> int | None:
    """Where `magic` stands next in the file, from `position` on."""
    file.seek(position)
    overlap = b""
    while chunk := file.read(1 << 20):
        found = (overlap + chunk).find(magic)
        if found >= 0:
            return position - len(overlap) + found
        position += len(chunk)
        overlap = chunk[-len(magic) + 1 :]
    return None


def _archived(record: WarcRecord, path: str, max_bytes: int) -> Record:
    url = (record.headers.get("WARC-Target-URI") or record.record_id or path).strip("<>")
    size = record.content_length
    if size > max_bytes:
        return Record(b"", url, problem="too_large", size=size)
    body = record.reader.read()
    if len(body) != size:
        return Record(b"", url, problem="broken_record", size=len(body))
    content_type, charset = (record.headers.get("Content-Type") or "").lower(), None
    if content_type.startswith("application/http"):
        # Parsed by itself, so that a wrong header or content encoding costs one record and not the rest of the file.
        inner = WarcRecord()
        inner.init_headers(WarcRecordType.response)
        inner.set_bytes_content(body)
        inner.is_http = True
        try:
            inner.parse_http(auto_decode="all", strict_mode=False)
            body = inner.reader.read(max_bytes + 1)
        except (OSError, ValueError, RuntimeError):
            return Record(b"", url, problem="broken_record", size=size)
        status = inner.http_headers.status_code if inner.http_headers else None
        if status is not None and status != 200:
            return Record(b"", url, problem="http_status", size=len(body))
        content_type, charset = (inner.http_content_type or "").lower(), inner.http_charset
    if len(body) > max_bytes:
        return Record(b"", url, problem="too_large", size=len(body))
    if content_type and not content_type.startswith((*_PAGE_TYPES, "text/plain")):
        return Record(b"", url, problem="not_a_page", size=len(body))
    if not body:
        return Record(b"", url, problem="empty_record")
    return Record(body, url, not content_type.startswith("text/plain"), charset, size=len(body))
