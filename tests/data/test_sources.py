"""Reading corpora: every format, a fixed order, and errors that name file and line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import seqio
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data.sources import Corpus, DocumentSource, documents, in_validation, list_files

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
