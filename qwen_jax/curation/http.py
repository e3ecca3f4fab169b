"""HTTP responses as crawlers stored them: status, fields and the body, decoded where the headers are true.

Archives keep headers that the body no longer matches: many crawlers unpack a body and keep `Content-Encoding` and
`Transfer-Encoding` (Common Crawl's news archives before May 2019, pywb's samples). A body is decoded if it is in the
encoding that the headers name or that its first bytes show; otherwise it is taken as it stands.
"""

import functools
import re
import zlib
from collections.abc import Mapping

import brotli
import zstandard

from qwen_jax.curation.streams import GZIP_MAGIC, ZSTD_MAGIC

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_FIELD = re.compile(r"\n([^:\n]*):([^\n]*)")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CHUNK_END = re.compile(rb"\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s;,\"']+))", re.IGNORECASE)
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Frames follow one another, and between them there may be some that readers skip (RFC 8878, 3.1).
_ZSTD_FRAME = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_MAX_LAYERS = 4
_BLOCK = 1 << 12


class BrokenBody(ValueError):
    """A compressed body that does not decompress."""


def split_response(data: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """Status code, fields by names in lower case, and the body, not decoded.

    Headers may end their lines in LF alone. Data without a status line has no fields and is all body.
    """
    informed = 0
    while True:
        if not data.startswith(b"HTTP/"):
            return None, {}, data
        end = _HEAD_END.search(data)
        head, body = (data[: end.start()], data[end.end() :]) if end else (data, b"")
        text = head.decode("latin-1")
        words = text.partition("\n")[0].split()
        status = int(words[1]) if len(words) > 1 and words[1].isascii() and words[1].isdigit() else None
        before = status is not None and 100 <= status < 200 and body.startswith(b"HTTP/")
        if not before or informed == _MAX_LAYERS:
            return status, _fields(text), body
        data = body  # "100 Continue" comes before the response
        informed += 1


def _fields(head: str) -> dict[str, str]:
    pairs = _FIELD.findall(head)
    fields = {name.strip().lower(): value.strip() for name, value in pairs}
    if len(fields) == len(pairs) and "\n " not in head and "\n\t" not in head:
        return fields
    fields, name = {}, None
    for line in head.split("\n")[1:]:
        if line[:1] in (" ", "\t") and name is not None:
            fields[name] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower() if colon else None
        if name is not None:
            combined = name in fields and name.endswith("-encoding")
            fields[name] = f"{fields[name]}, {value.strip()}" if combined else value.strip()
    return fields


@functools.lru_cache(maxsize=256)
def charset(content_type: str) -> str | None:
    """The `charset` of a Content-Type, without its quotes."""
    found = _CHARSET.search(content_type) if content_type else None
    return next(one for one in found.groups() if one is not None).strip() if found else None


def decode_body(fields: Mapping[str, str], body: bytes, max_bytes: int) -> bytes:
    """The body without chunks and compression; of one with more than `max_bytes`, some more than those.

    Raises:
        BrokenBody: the body is compressed and cut off or damaged.
    """
    named = f"{fields.get('content-encoding', '')},{fields.get('transfer-encoding', '')}"
    names = {name.strip().removeprefix("x-") for name in named.lower().split(",")} if len(named) > 1 else ()
    if "chunked" in names:
        body = _join_chunks(body)
    layers = 0
    # Servers compress twice, and crawlers that unpack forget a layer: the first bytes decide.
    while body.startswith((GZIP_MAGIC, ZSTD_MAGIC)) and layers < _MAX_LAYERS:
        body = (_gunzip if body.startswith(GZIP_MAGIC) else _unzstd)(body, max_bytes)
        layers += 1
    if layers == 0 and body:
        for name, decoder in (("deflate", _undeflate), ("br", _unbrotli)):
            if name in names:
                return _decoded_or_text(decoder, body, max_bytes)
    return body


def _join_chunks(body: bytes) -> bytes:
    """Data of a chunked body; a body that is not chunked, unchanged; of a truncated one, the data before the cut."""
    parts, place = [], 0
    while found := _CHUNK_SIZE.match(body, place):
        size = int(found[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[found.end() : found.end() + size])
        if found.end() + size >= len(body):
            return b"".join(parts)
        end = _CHUNK_END.match(body, found.end() + size)
        if end is None:
            return body
        place = end.end()
    return b"".join(parts) if place and place == len(body) else body


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    parts, size, place = [], 0, 0
    while body.startswith(GZIP_MAGIC, place) and size <= max_bytes:
        length, content = _inflate(zlib.decompressobj(wbits=31), memoryview(body)[place:], max_bytes + 1 - size)
        parts.append(content)
        size, place = size + len(content), place + length
    return b"".join(parts)


def _undeflate(body: bytes, max_bytes: int) -> bytes:
    # The RFC means the zlib format; some servers send the bare one, and browsers take both.
    is_zlib = body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
    return _inflate(zlib.decompressobj(wbits=15 if is_zlib else -15), memoryview(body), max_bytes + 1)[1]


def _inflate(inflate, body: memoryview, limit: int) -> tuple[int, bytes]:
    """Length of the compressed data, and at most `limit` bytes of contents."""
    parts, size, place = [], 0, 0
    try:
        while place < len(body) and size < limit and not inflate.eof:
            # By blocks: what follows a member is copied, and a body may have a member every 20 bytes.
            block = body[place : place + _BLOCK]
            parts.append(inflate.decompress(block, limit - size))
            size += len(parts[-1])
            place += len(block) - len(inflate.unconsumed_tail) - len(inflate.unused_data)
    except zlib.error as error:
        raise BrokenBody(str(error)) from error
    if not inflate.eof and size < limit:
        raise BrokenBody("cut off")
    return place, b"".join(parts)


def _unzstd(body: bytes, max_bytes: int) -> bytes:
    decompressor, parts, size, place = zstandard.ZstdDecompressor(), [], 0, 0
    try:
        while size <= max_bytes and _ZSTD_FRAME.match(body, place):
            frame = decompressor.decompressobj()
            while not frame.eof and size <= max_bytes:
                if place == len(body):
                    raise BrokenBody("cut off")
                block = body[place : place + (1 << 8)]  # a block of four bytes can stand for 128 KiB
                parts.append(frame.decompress(block))
                size += len(parts[-1])
                place += len(block) - len(frame.unused_data)
    except zstandard.ZstdError as error:
        raise BrokenBody(str(error)) from error
    return b"".join(parts)


def _unbrotli(body: bytes, max_bytes: int) -> bytes:
    decoder = brotli.Decompressor()
    try:
        content = decoder.process(body, output_buffer_limit=max_bytes + 1)
        while not decoder.is_finished() and len(content) <= max_bytes:
            more = decoder.process(b"", output_buffer_limit=max_bytes + 1 - len(content))
            if not more:
                raise BrokenBody("cut off")
            content += more
    except brotli.error as error:
        raise BrokenBody(str(error)) from error
    return content


def _decoded_or_text(decoder, body: bytes, max_bytes: int) -> bytes:
    """The decoded body, or the body as it stands if it cannot be decoded and looks like text."""
    try:
        return decoder(body, max_bytes)
    except BrokenBody:
        if _CONTROL.search(body[:512]) and not body.startswith(_BYTE_ORDER_MARKS):
            raise
        return body
