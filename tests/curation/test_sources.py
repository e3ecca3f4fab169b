"""Files by the names that crawlers and data sets give them: read, refused, or named as left out."""

import gzip
import struct

import pytest
import zstandard

from qwen_jax.curation import readers, sources

LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.warc.wet.gz", sources.WARC),
        ("CC-MAIN.WARC.GZ", sources.WARC),
        ("x.warc.zst", sources.WARC),
        ("x.wet", sources.WARC),
        ("c4-train.00000-of-01024.json.gz", sources.LINES),
        ("x.json.zst", sources.LINES),
        ("x.ndjson", sources.LINES),
        ("x.JSONL", sources.LINES),
        ("x.html.gz", sources.HTML),
        ("x.Txt", sources.TEXT),
        ("x.parquet", sources.PARQUET),
        ("x.json", None),
        ("x.warc.wat.gz", None),
        ("x.tar.gz", None),
        ("x.gz", None),
        ("jsonl", None),
    ],
)
def test_formats_by_suffix(name, kind):
    assert sources.file_format(f"/folder.jsonl/{name}") == kind


def test_names_with_characters_of_globs(tmp_path):
    for name in ("part[1].jsonl", "part1.jsonl", "what?.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    for name in ("part[1].jsonl", "what?.jsonl"):
        found = sources.list_source("web", [str(tmp_path / name)]).files
        assert [path.rsplit("/", 1)[1] for path, _ in found] == [name]
    (tmp_path / "part[1].jsonl").unlink()
    found = sources.list_source("web", [str(tmp_path / "part[1].jsonl")]).files
    assert [path.rsplit("/", 1)[1] for path, _ in found] == ["part1.jsonl"]


def test_files_that_a_folder_leaves_out_are_named(tmp_path):
    (tmp_path / "a" / ".cache").mkdir(parents=True)
    for name in ("b.jsonl", "a/c.png", "a/.d.jsonl", "a/.cache/e.jsonl", "README"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    source = sources.list_source("web", [str(tmp_path)])
    left = [(path.removeprefix(f"{tmp_path}/"), reason) for path, reason in source.left_out]
    assert left == [
        ("README", "unknown_suffix"),
        ("a/.cache/e.jsonl", "hidden"),
        ("a/.d.jsonl", "hidden"),
        ("a/c.png", "unknown_suffix"),
    ]
    assert [path.removeprefix(f"{tmp_path}/") for path, _ in source.files] == ["b.jsonl"]


def long_window(data: bytes, log: int) -> bytes:
    """A frame as `zstd --long` writes it: RFC 8878, one raw block, window of 2**log bytes."""
    assert len(data) < 1 << 17
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(log - 10) << 3]) + struct.pack("<I", len(data) << 3 | 1)[:3] + data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.json.gz", gzip.compress(LINES)),
        ("x.JSON.ZST", zstandard.compress(LINES)),
        ("x.jsonl.zst", long_window(LINES, 27)),
        ("x.jsonl.zst", long_window(LINES, 31)),
        (
            "x.jsonl.zst",
            zstandard.compress(LINES[:9]) + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstandard.compress(LINES[9:]),
        ),
        ("x.jsonl.gz", gzip.compress(LINES[:9]) + gzip.compress(LINES[9:]) + bytes(512)),
        ("x.jsonl", gzip.compress(LINES)),  # the name lost its suffix
        ("x.jsonl.gz", LINES),  # the client unpacked it
        ("x.jsonl", b"\xef\xbb\xbf" + LINES),
    ],
    # Named, since gzip writes the time: workers would collect different tests.
    ids=("gzip", "zstd", "window 27", "window 31", "frames", "members", "no suffix", "unpacked", "byte order mark"),
)
def test_json_lines_in_all_compressions(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    found = list(readers.read(str(tmp_path / name), text_field="text", max_bytes=1000))
    assert [(one.problem, one.payload) for one in found] == [(None, "one"), (None, "two")]


def test_archives_in_zstandard_with_a_dictionary(tool, tmp_path):
    make = tool("make_crawl").warc_record
    records = [make(f"http://{number}", b"<p>page %d" % number) for number in range(60)]
    dictionary = zstandard.train_dictionary(2000, records * 5)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary)
    packed = zstandard.compress(dictionary.as_bytes())
    for stored in (dictionary.as_bytes(), packed):
        head = b"\x5d\x2a\x4d\x18" + struct.pack("<I", len(stored)) + stored
        (tmp_path / "x.warc.zst").write_bytes(head + b"".join(map(compressor.compress, records)))
        found = list(readers.read(str(tmp_path / "x.warc.zst"), text_field="text", max_bytes=1000))
        assert [one.payload for one in found] == [b"<p>page %d" % number for number in range(60)]


def archived(kind: str, url: str, content_type: str, body: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def test_records_that_are_no_pages(tmp_path):
    wget = "<metadata://gnu.org/software/wget/warc/"
    data = b"".join(
        [
            archived("warcinfo", "", "application/warc-fields", b"software: Wget"),
            archived("metadata", wget + "MANIFEST.txt>", "text/plain", b"<urn:uuid:1>"),
            archived("resource", wget + "wget_arguments.txt>", "text/plain", b'"http://x"'),
            archived("resource", wget + "wget.log>", "text/plain", b"connected"),
            archived("resource", "urn:text:http://x", "text/plain", b"the text of a page once more"),
            archived("conversion", "http://x", "text/plain", "text of Common Crawl's WET — 文本".encode()),
            archived("resource", "http://y", "text/html; charset=gbk", "<p>文本".encode("gbk")),
        ]
    )
    (tmp_path / "x.warc.wet.gz").write_bytes(gzip.compress(data))
    found = list(readers.read(str(tmp_path / "x.warc.wet.gz"), text_field="text", max_bytes=1000))
    assert [one.problem for one in found] == ["not_a_page"] * 3 + [None, None]
    assert not found[3].is_html and found[4].is_html and found[4].charset == "gbk"


def test_a_file_that_cannot_be_opened_is_counted_whole(tmp_path):
    from qwen_jax.curation.tally import Tally

    tally = Tally(1000)
    found = list(readers.read(str(tmp_path / "gone.jsonl"), text_field="text", max_bytes=1000, tally=tally))
    assert [one.problem for one in found] == ["unreadable_file"] and tally.outcomes == {"unreadable_file": [1, 1000]}
