"""Responses whose headers and bodies do not match, as archives hold them."""

import gzip
import zlib

import brotli
import pytest
import zstandard

from qwen_jax.curation import http, readers

PAGE = "<p>The river is 3 km long — 河流很长。".encode() * 20
RAW = zlib.compressobj(wbits=-15)
RAW_DEFLATE = RAW.compress(PAGE) + RAW.flush()
# A frame of Zstandard that readers skip (RFC 8878, 3.1.2).
SKIPPED = b"\x50\x2a\x4d\x18\x05\x00\x00\x00index"
CHUNKED = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (PAGE[:100], PAGE[100:], b""))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        # The body is in the encoding that is named.
        ("Content-Encoding: gzip", gzip.compress(PAGE)),
        ("Content-Encoding: x-gzip", gzip.compress(PAGE)),
        ("Content-Encoding: gzip", gzip.compress(PAGE[:50]) + gzip.compress(PAGE[50:])),
        ("Content-Encoding: gzip, gzip", gzip.compress(gzip.compress(PAGE))),
        ("Content-Encoding: gzip\r\nContent-Encoding: gzip", gzip.compress(gzip.compress(PAGE))),
        ("Content-Encoding: deflate", zlib.compress(PAGE)),
        ("Content-Encoding: deflate", RAW_DEFLATE),
        ("Content-Encoding: BR", brotli.compress(PAGE)),
        ("Content-Encoding: zstd", zstandard.compress(PAGE)),
        ("Content-Encoding: zstd", zstandard.compress(PAGE[:50]) + SKIPPED + zstandard.compress(PAGE[50:]) + b"\n"),
        ("Transfer-Encoding: chunked", CHUNKED),
        ("Transfer-Encoding: chunked", CHUNKED.replace(b"\r\n", b"\n")),
        ("Transfer-Encoding: chunked", CHUNKED[:-7]),
        (
            "Transfer-Encoding: gzip, chunked",
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(gzip.compress(PAGE)), gzip.compress(PAGE)),
        ),
        # The body was unpacked when it was stored, and the header kept.
        *((f"Content-Encoding: {name}", PAGE) for name in ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")),
        ("Transfer-Encoding: chunked", PAGE),
        ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", PAGE),
        ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", gzip.compress(PAGE)),
        ("Content-Encoding: br", PAGE.decode().encode("utf-16")),
        # Names of no compression.
        *((f"Content-Encoding: {name}", PAGE) for name in ("none", "utf-8", "8bit", "identity", "", "binary", "?")),
        # The body is compressed, and no header says so.
        ("X-Crawl-Content-Encoding: gzip", gzip.compress(PAGE)),
        ("Content-Encoding: br", gzip.compress(PAGE)),
    ],
)
def test_bodies_are_decoded_or_taken_as_they_stand(header, body):
    for end in ("\r\n", "\n"):
        response = (
            f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{header}\r\n\r\n".replace("\r\n", end).encode() + body
        )
        status, fields, rest = http.split_response(response)
        expected = PAGE.decode().encode("utf-16") if body.startswith(b"\xff\xfe") else PAGE
        assert status == 200 and fields["content-type"] == "text/html"
        decoded = http.decode_body(fields, rest, 10**6)
        assert decoded == (expected if body != CHUNKED[:-7] else PAGE)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("gzip", gzip.compress(PAGE)[:-20]),
        ("gzip", gzip.compress(PAGE)[:30] + bytes(9) + gzip.compress(PAGE)[39:]),
        ("none", gzip.compress(PAGE)[:-20]),
        ("deflate", zlib.compress(PAGE)[:-20]),
        ("deflate", RAW_DEFLATE[:-20]),
        ("br", brotli.compress(PAGE)[:-5]),
        ("zstd", zstandard.compress(PAGE)[:-5]),
        ("zstd", zstandard.compress(PAGE) + zstandard.compress(PAGE)[:-5]),
    ],
)
def test_compressed_bodies_that_break_are_broken(name, body):
    with pytest.raises(http.BrokenBody):
        http.decode_body({"content-encoding": name}, body, 10**6)


def test_no_more_than_the_limit_is_unpacked():
    bomb = bytes(50_000_000)
    for name, body in (
        ("gzip", gzip.compress(bomb)),
        ("br", brotli.compress(bomb, quality=1)),
        ("zstd", zstandard.compress(bomb)),
        ("zstd", zstandard.compress(bytes(900)) * 50_000),
    ):
        assert 1000 < len(http.decode_body({"content-encoding": name}, body, 1000)) < 40_000_000


def test_many_empty_members_take_linear_time():
    for name, compress in (("gzip", gzip.compress), ("zstd", zstandard.compress)):
        body = compress(b"") * 200_000 + compress(PAGE)
        assert http.decode_body({"content-encoding": name}, body, 10**6) == PAGE


def test_odd_responses():
    continued = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nA: b\r\n c\r\n\r\nbody"
    assert http.split_response(continued) == (404, {"a": "b c"}, b"body")
    assert http.split_response(b"<p>no headers") == (None, {}, b"<p>no headers")
    assert http.split_response(b"HTTP/1.1 200 OK\r\nA: b") == (200, {"a": "b"}, b"")
    assert http.split_response(b"HTTP/1.0 200\n\n\nbody") == (200, {}, b"\nbody")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("text/html; charset=gbk", "gbk"),
        ('text/html; charset="gbk"', "gbk"),
        ("text/html;charset='gbk'", "gbk"),
        ("text/html; CharSet = GBK ; x=y", "GBK"),
        ("text/html", None),
        ("text/html; charset=", None),
    ],
)
def test_charset_of_a_content_type(content_type, expected):
    assert http.charset(content_type) == expected


def test_archives_of_pages_without_their_compression(tool, tmp_path):
    make = tool("make_crawl").warc_record
    records = [
        make(
            f"http://{number}",
            PAGE,
            f"text/html; charset=utf-8\r\nContent-Encoding: {name}\r\nTransfer-Encoding: chunked",
        )
        for number, name in enumerate(["gzip", "deflate", "br", "none"])
    ]
    lines = make("http://lf", PAGE).replace(b"\r\n", b"\n")
    length = lines.split(b"Content-Length: ")[1].split(b"\n")[0]
    records.append(lines.replace(length, str(int(length) - 3).encode()))  # three lines of its header lost one byte
    (tmp_path / "x.warc").write_bytes(b"".join(records))
    found = list(readers.read(str(tmp_path / "x.warc"), text_field="text", max_bytes=10_000))
    assert [(one.problem, one.payload) for one in found] == [(None, PAGE)] * 5
