"""Records of a corpus as crawlers and others left it: WARC, HTML, text, JSON lines and Parquet.

Nothing here is fatal for a run: a record that cannot be read comes with a `problem`, is counted and reported. A file
is read as a stream, and no record larger than a limit is ever held in memory. Every byte of a file is counted in its
`Tally`, as read or as left out.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from qwen_jax import files
from qwen_jax.curation import http, sources, warc
from qwen_jax.curation.streams import Stream
from qwen_jax.curation.tally import READ, Tally

_URL_FIELDS = ("url", "uri", "link")
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_PAGES = ("response", "resource", "conversion")
# What crawlers store beside pages: logs and settings (wget, warcprox, Browsertrix), name resolution (Heritrix).
_OTHER_SCHEMES = ("metadata:", "urn:", "dns:", "whois:", "warcinfo:", "screenshot:")


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        payload: a page or text in bytes, or text that needs no decoding.
        url: where it is from; the path for files that do not say.
        is_html: whether text must be extracted.
        charset: of the HTTP header, for bytes.
        problem: why there is no payload, or None.
        size: bytes of the payload, or of skipped data where that is known.
    """

    payload: bytes | str
    url: str
    is_html: bool = False
    charset: str | None = None
    problem: str | None = None
    size: int = 0


def read(path: str, *, text_field: str, max_bytes: int, tally: Tally | None = None) -> Iterator[Record]:
    """Records of one file, in order. Never raises for the contents of the file.

    An object of a bucket is read in ranges, ahead of what is worked on; Parquet is copied to this machine first.

    Args:
        path: a file, or URL of an object, whose suffix `sources.file_format` knows.
        text_field: field of JSON lines, column of Parquet. A field `html` is taken where it is missing.
        max_bytes: a larger payload is a problem, `too_large`.
        tally: counts every byte of the file by the end.

    Raises:
        OSError: a bucket does not answer, refuses, or the object was replaced while it was read.
    """
    tally = tally if tally is not None else Tally(0)
    kind = sources.file_format(path)
    with files.local_copy(path) if kind == sources.PARQUET else contextlib.nullcontext(path) as local:
        try:
            with files.open_file(local) as file:
                if not file.peek(1):
                    tally.finish("empty_file", 1)
                    yield Record(b"", path, problem="empty_file")
                    return
                if kind == sources.PARQUET:
                    yield from _parquet(str(local), path, text_field, max_bytes, tally)
                    tally.finish(READ)
                    return
                stream = Stream(file, path)
                if kind == sources.WARC:
                    yield from _warc(stream, path, max_bytes, tally)
                elif kind == sources.LINES:
                    yield from _json_lines(stream, path, text_field, max_bytes, tally)
                else:
                    yield _whole(stream, path, kind == sources.HTML, max_bytes, tally)
            tally.finish(READ)
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            if files.is_remote(local) and isinstance(error, OSError):
                raise  # the bucket's: of the contents nothing is known
            # The rest of the file is lost; earlier records are kept.
            tally.finish("unreadable_file", 1)
            yield Record(b"", f"{path}: {error}"[:300], problem="unreadable_file")


def _whole(stream: Stream, path: str, is_html: bool, max_bytes: int, tally: Tally) -> Record:
    if stream.fill(max_bytes + 1):
        size = 0
        while stream.fill():
            size += len(stream.data)
            stream.drop(len(stream.data))
        record = Record(b"", path, problem="too_large", size=size + len(stream.data))
    else:
        record = Record(bytes(stream.data), path, is_html, size=len(stream.data))
    if stream.gap is not None:
        record = Record(b"", f"{path}: {stream.gap.reason}", problem="unreadable_file", size=record.size)
    tally.finish(record.problem or READ, 1)
    return record


def _json_lines(stream: Stream, path: str, text_field: str, max_bytes: int, tally: Tally) -> Iterator[Record]:
    number, behind_gap = 0, False
    while True:
        line, size = stream.line(max_bytes)
        number += 1
        where = f"{path}:{number}"
        if stream.gap is not None and not stream.data and not line.endswith(b"\n"):
            gap = stream.pass_gap()
            tally.up_to(gap.end, "unreadable_file")
            yield Record(b"", f"{where}: {gap.reason}", problem="unreadable_file", size=size)
            behind_gap = True
            continue
        if size == 0:
            return
        if not line:
            record = Record(b"", where, problem="too_large", size=size)
        elif not line.strip():
            tally.up_to(stream.position, READ, 0)
            continue
        else:
            record = _json_record(line, where, text_field)
            if record.problem == "bad_json" and behind_gap:
                # The line began in the damaged stretch, which is counted already.
                tally.up_to(stream.position, "unreadable_file", 0)
                behind_gap = False
                continue
        behind_gap = False
        tally.up_to(stream.position, record.problem or READ)
        yield record


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


def _parquet(local: str, path: str, text_field: str, max_bytes: int, tally: Tally) -> Iterator[Record]:
    """Rows of a table. A row group that cannot be read costs its own rows; bytes are shared out evenly over rows."""
    with pyarrow.parquet.ParquetFile(local) as table:
        columns = [name for name in (text_field, "html", *_URL_FIELDS) if name in table.schema_arrow.names]
        number = position = 0
        for group in range(table.num_row_groups):
            described = table.metadata.row_group(group)
            size = sum(described.column(one).total_compressed_size for one in range(described.num_columns))
            rows, done = described.num_rows, 0
            try:
                for batch in table.iter_batches(batch_size=256, columns=columns, row_groups=[group]):
                    for row in _rows_of(batch):
                        number, done = number + 1, done + 1
                        where = f"{path}:{number}"
                        broken = Record(b"", where, problem="broken_record")
                        record = broken if row is None else _row(row, where, text_field, 0)
                        if record.size > max_bytes:
                            record = Record(b"", record.url, problem="too_large", size=record.size)
                        tally.up_to(position + size * done // rows, record.problem or READ)
                        yield record
            except (OSError, pyarrow.ArrowException) as error:
                tally.up_to(position + size, "unreadable_file", rows - done)
                where = f"{path}:{number + 1}: {rows - done} rows: {error}"[:300]
                yield Record(b"", where, problem="unreadable_file")
                number += rows - done
            position += size


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict | None]:
    """The rows; None in the place of one whose text is not UTF-8, which Parquet does not look at."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for place in range(batch.num_rows) for row in _rows_of(batch.slice(place, 1))]


def _warc(stream: Stream, path: str, max_bytes: int, tally: Tally) -> Iterator[Record]:
    for found in warc.records(stream, max_bytes):
        kind = found.headers.get("warc-type", "").lower()
        if found.problem != "broken_record" and kind not in _PAGES:
            tally.up_to(found.end, f"warc_{kind or 'unknown'}")
            continue
        url = found.headers.get("warc-target-uri") or found.headers.get("warc-record-id") or path
        if found.problem is not None:
            where = url if url != path or not found.reason else f"{path}: {found.reason}"
            record = Record(b"", where.strip("<>"), problem=found.problem, size=found.size)
        else:
            record = _archived(found, url.strip("<>"), max_bytes)
        tally.up_to(found.end, record.problem or READ)
        yield record


def _archived(found: warc.WarcRecord, url: str, max_bytes: int) -> Record:
    """The page in a response, resource or conversion record."""
    body, content_type = found.body, found.headers.get("content-type", "")
    if content_type.lower().startswith("application/http"):
        status, fields, body = http.split_response(body)
        if status is not None and status != 200:
            return Record(b"", url, problem="http_status", size=len(body))
        try:
            body = http.decode_body(fields, body, max_bytes)
        except http.BrokenBody:
            return Record(b"", url, problem="broken_record", size=found.size)
        content_type = fields.get("content-type", "")
    if len(body) > max_bytes:
        return Record(b"", url, problem="too_large", size=len(body))
    media_type = content_type.strip().lower()
    if url.startswith(_OTHER_SCHEMES) or (media_type and not media_type.startswith((*_PAGE_TYPES, "text/plain"))):
        return Record(b"", url, problem="not_a_page", size=len(body))
    if not body:
        return Record(b"", url, problem="empty_record")
    return Record(body, url, not media_type.startswith("text/plain"), http.charset(content_type), size=len(body))
