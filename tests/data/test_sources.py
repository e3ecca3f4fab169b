"""Reading corpora: every format, a fixed order, and errors that name file and line."""

import gzip
import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import seqio
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data.corpora import Corpus, documents, in_validation, list_files
from qwen_jax.data.sources import DocumentSource

ROWS = [{"text": "first é"}, {"text": "second\nline"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("plain\r\ntext", newline="")
    (tmp_path / "a.md").write_text("# page")
    (tmp_path / "sub" / "c.rst").write_text("rest")
    (tmp_path / "sub" / "d.py").write_text("pass")
    (tmp_path / "e.jsonl").write_bytes(LINES + b"\n")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(LINES))
    # Two frames, as parallel compressors write them.
    half = len(json.dumps(ROWS[0])) + 1
    frames = [zstandard.compress(LINES[:half]), zstandard.compress(LINES[half:])]
    (tmp_path / "g.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"text": [row["text"] for row in ROWS], "id": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "h.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_every_format_in_order(corpus):
    found = [(Path(d["source"]).name, d["text"]) for d in documents(corpus)]
    two = [row["text"] for row in ROWS]
    expected = [("a.md", "# page"), ("b.txt", "plain\r\ntext")]
    for name in ("e.jsonl", "f.jsonl.gz", "g.jsonl.zst", "h.parquet"):
        expected += [(name, text) for text in two]
    assert found == [*expected, ("c.rst", "rest"), ("d.py", "pass")]


def test_globs_and_lists(corpus):
    names = [path.name for path in list_files([str(corpus / "**" / "*.py"), str(corpus / "*.md"), str(corpus / "a.*")])]
    assert names == ["a.md", "d.py"]


def test_other_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    assert [d["text"] for d in documents(tmp_path, text_field="content")] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b"{broken\n", r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"texts": "x"}\n', r"a\.jsonl:1: expected an object with a field 'text', found texts"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: expected an object with a field 'text', found list"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' is int, expected a string"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not JSON"),
        ("a.jsonl.gz", gzip.compress(LINES * 99)[:-20], r"a\.jsonl\.gz: cannot be read past line \d+"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read past line 0"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: cannot be read past line 0"),
        ("a.parquet", b"no parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", b"", "no document with any text"),
    ],
    # By hand: an id made from the bytes would hold gzip's time stamp and differ between pytest-xdist's workers.
    ids=("json", "field", "object", "string", "utf-8", "cut gzip", "gzip", "zstd", "parquet", "empty"),
)
def test_malformed_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(tmp_path))


CHINESE = "从前有一座山，山里有一座庙，庙里有一个老和尚给小和尚讲故事。\n" * 40
JAPANESE = "むかしむかし、あるところに、おじいさんとおばあさんが住んでいました。\n" * 40


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(CHINESE, e) for e in ("gbk", "gb18030", "utf-16", "utf-8-sig")]
    + [(JAPANESE, "shift_jis"), ("café été\n" * 40, "cp1252")],
)
def test_text_files_in_other_encodings_are_decoded(tmp_path, text, encoding):
    pytest.importorskip("resiliparse", reason="finding encodings needs resiliparse")
    (tmp_path / "a.TXT").write_bytes(text.encode(encoding))
    assert [document["text"] for document in documents(tmp_path)] == [text]


def test_python_sources_are_read_in_the_encoding_that_they_declare(tmp_path):
    text = "# -*- coding: cp1251 -*-\nname = 'Чехов'\n"
    (tmp_path / "a.py").write_bytes(text.encode("cp1251"))
    assert [document["text"] for document in documents(tmp_path)] == [text]


def test_stray_bytes_become_replacement_characters_and_are_said(tmp_path, caplog):
    pytest.importorskip("resiliparse", reason="finding encodings needs resiliparse")
    (tmp_path / "a.txt").write_bytes(CHINESE.encode() + b"\xff")
    assert [document["text"] for document in documents(tmp_path)] == [CHINESE + "\ufffd"]
    assert re.search(r"a\.txt: read as utf-8; bytes that do not fit become U\+FFFD: .* position \d+", caplog.text)


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 9, "only ASCII\n".encode("utf-16-le") * 9], ids=["bytes", "utf-16"]
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt: .*leave it out if it is binary") as error:
        list(documents(tmp_path))
    assert "\n" not in str(error.value)


def test_without_resiliparse_other_encodings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen_jax.curation.html", None)
    (tmp_path / "a.txt").write_bytes(CHINESE.encode("gbk"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 .*encoding cannot be found.*iconv"):
        list(documents(tmp_path))


# Whatever JSON allows in a string, between tokens and around them; a line feed alone ends a line.
VALUES = st.text(
    st.characters(codec="utf-8") | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\r\n\ufeff"), min_size=1, max_size=8
)


@given(
    texts=st.lists(VALUES, min_size=1, max_size=5),
    mark=st.booleans(),
    ascii_only=st.booleans(),
    ends=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    separator=st.sampled_from([" ", "\r", "\t", ""]),
)
def test_json_lines_are_read_as_their_format_says(tmp_path_factory, texts, mark, ascii_only, ends, separator):
    from qwen_jax.curation.contamination import benchmark_texts
    from qwen_jax.generate import read_prompts

    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    rows = [{"text": text, "prompt": text} for text in texts]
    lines = [json.dumps(row, ensure_ascii=ascii_only, separators=("," + separator, ":" + separator)) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" * mark + ends.join(lines).encode())
    assert [document["text"] for document in documents(path)] == texts == read_prompts(path)
    assert list(benchmark_texts(str(path))) == [text for text in texts for _ in range(2)]


def test_names_in_capitals_and_with_brackets_and_files_that_are_left_out(tmp_path, caplog):
    (tmp_path / "part[1].jsonl").write_bytes(LINES)
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "d.json.zst").write_bytes(zstandard.compress(LINES))
    (tmp_path / "e.pdf").touch()
    assert [path.name for path in list_files(tmp_path / "part[1].jsonl")] == ["part[1].jsonl"]
    assert len(list(documents(tmp_path))) == 4 * len(ROWS)
    assert "not read, because their suffix is none of a corpus: e.pdf" in caplog.text


def test_long_windows_are_read_and_a_cut_is_not_taken_for_the_end(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    # Unknown size, or the window would be made smaller than asked for; a flush ends a block at a line.
    stream = compressor.compressobj()
    first = stream.compress(LINES) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(first + stream.compress(LINES) + stream.flush())
    assert len(list(documents(tmp_path))) == 2 * len(ROWS)
    (tmp_path / "a.jsonl.zst").write_bytes(first)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: cannot be read past line 2: cut off within a frame"):
        list(documents(tmp_path))


def test_malformed_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: expected a column 'text', found body"):
        list(documents(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: 'text' is NoneType"):
        list(documents(tmp_path))


def test_nothing_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of a corpus matches"):
        list(documents(tmp_path / "nowhere" / "*.txt"))
    with pytest.raises(FileNotFoundError, match="no file of a corpus matches"):
        list(documents(tmp_path))


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a\.csv: unknown suffix; a corpus has files of \.txt"):
        list_files(str(tmp_path / "*"))


@given(texts=st.lists(st.text(), unique=True, max_size=50), share=st.floats(0, 0.5))
def test_validation_grows_with_its_share_and_only_grows(texts, share):
    small = {text for text in texts if in_validation(text, share)}
    assert small <= {text for text in texts if in_validation(text, share * 2)}
    assert not any(in_validation(text, 0.0) for text in texts)


def test_validation_has_its_share():
    assert 800 < sum(in_validation(f"document {i}", 0.1) for i in range(10_000)) < 1200


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=6), share=st.sampled_from([1e-9, 0.01, 0.3]))
def test_a_share_of_several_documents_holds_out_at_least_one(tmp_path_factory, texts, share):
    path = tmp_path_factory.mktemp("few") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = DocumentSource(lambda: Corpus([path], validation_share=share))
    held_out = [example["text"] for example in source.get_dataset("validation").as_numpy_iterator()]
    assert bool(held_out) or len(set(texts)) == 1
    assert not list(DocumentSource(lambda: Corpus([path], validation_share=0)).get_dataset("validation"))


def test_impossible_share():
    with pytest.raises(ValueError, match=r"validation_share is 1\.5"):
        Corpus([], validation_share=1.5)


def test_source_shards_and_splits_are_a_partition(corpus):
    source = DocumentSource(lambda: Corpus(list_files(corpus), validation_share=0.5), num_shards=3)
    assert source.list_shards("train") == [f"files-0000{i}-of-00003" for i in range(3)]
    found = []
    for split in source.splits:
        whole = [ex["text"].decode() for ex in source.get_dataset(split, shuffle=False).as_numpy_iterator()]
        sharded = [
            ex["text"].decode()
            for i in range(3)
            for ex in source.get_dataset(split, shard_info=seqio.ShardInfo(i, 3)).as_numpy_iterator()
        ]
        assert sorted(whole) == sorted(sharded)
        found += whole
    assert sorted(found) == sorted(d["text"] for d in documents(corpus))
    with pytest.raises(ValueError, match="no split 'test' in a corpus of files; there are train, validation"):
        source.list_shards("test")


def test_lone_surrogates_reach_tensorflow(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}' + "\n")
    source = DocumentSource(lambda: Corpus(list_files(tmp_path), validation_share=0))
    texts = [example["text"] for example in source.get_dataset("train").as_numpy_iterator()]
    assert texts == ["a\ufffdb".encode()]


def test_a_parquet_column_with_a_dot_in_its_name_is_not_a_field_of_a_struct(tmp_path):
    table = pyarrow.table({"text": [{"x": "inner"}], "text.x": ["outer"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [one["text"] for one in documents(str(tmp_path / "a.parquet"), text_field="text.x")] == ["outer"]
