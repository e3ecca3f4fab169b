"""The comparison of tokenizers, and the text that it is made on."""

import gzip
import json
import re
from pathlib import Path

import pytest
import seqio
import tokenizers
from PIL import Image

from qwen_jax.conversion.tokenizer import tokenizer_json
from qwen_jax.data.tokenizer import Tokenizer

ENGLISH, CHINESE = "The quick brown fox jumps over 1234 dogs.\n", "敏捷的棕色狐狸跳过懒狗。\n"


@pytest.fixture
def texts(tmp_path):
    """A folder with a folder for each of two languages."""
    for language, text in {"en": ENGLISH, "zh_CN": CHINESE}.items():
        (tmp_path / "texts" / language).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "texts" / language / f"{number}.txt").write_text(text * (number + 1), encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def compare(tool):
    return tool("compare_tokenizers")


def test_table_and_chart(compare, texts, vocabulary_file, tmp_path, capsys):
    model = Path(seqio.__file__).parent / "test_data" / "sentencepiece" / "sentencepiece.model"
    as_json = tmp_path / "tokenizer.json"
    as_json.write_text(json.dumps(tokenizer_json(Tokenizer(vocabulary_file))), encoding="utf-8")
    compare.main(
        [
            "--texts",
            str(texts),
            f"code:{texts}/en/*.txt",
            "--relative_to=small",
            f"--chart={tmp_path / 'c.png'}",
            "--tokenizers",
            "qwen=released",
            f"small={vocabulary_file}",
            f"json={as_json}",
            f"pieces={model}",
            f"digits={vocabulary_file}@cl100k",
        ]
    )
    shown = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:5]] == ["| zh_CN", "| en", "| code"]
    ours, small, text = Tokenizer(), Tokenizer(vocabulary_file), ENGLISH * 3
    pieces = seqio.SentencePieceVocabulary(str(model))
    read = [ENGLISH, ENGLISH * 2, text]
    encoders = (ours.encode, small.encode, small.encode, pieces.encode)
    tokens = [sum(len(encode(one)) for one in read) for encode in encoders]
    size = len(ENGLISH) * 6
    ratios = [f"{size / n:.2f} ({tokens[1] / n:.2f})" for n in tokens]
    assert f"| en | {size} | {' | '.join(ratios)} | " in shown
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "texts", "tokenizer.json"]


def test_numbers_in_the_pattern_of_cl100k(compare, tmp_path):
    """With a token for 123, cl100k's pattern uses it and Qwen's cannot."""
    from qwen_jax.data.byte_pairs import byte_ranks
    from qwen_jax.data.tokenizer import write_ranks

    write_ranks(byte_ranks() | {b"12": 256, b"123": 257}, tmp_path / "v.tiktoken")
    assert compare.load_tokenizer(f"{tmp_path / 'v.tiktoken'}@cl100k")(["1234", "12"]) == 3
    assert compare.load_tokenizer(str(tmp_path / "v.tiktoken"))(["1234", "12"]) == 6


def test_no_more_is_read_than_asked_for(compare, texts):
    sizes, ratios = compare.measure({"en": str(texts / "en")}, {"bytes": lambda parts: len(parts[0].encode())}, 50)
    assert sizes == {"en": 3 * len(ENGLISH)} and ratios == {"en": {"bytes": 1.0}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizers", "a"], "expected up to 10 NAME=FILE"),
        (["--tokenizers", "a=released", "a=released"], "each with a name of its own"),
        (["--tokenizers", "a=released", "--relative_to=b"], "--relative_to b: the tokenizers are a"),
        (["--tokenizers", "a=absent.json"], "no tokenizer at absent.json"),
        (["--tokenizers", "a=broken.json"], "broken.json is not a tokenizer.json"),
        (["--tokenizers", "a=broken.model"], "broken.model is not a SentencePiece model"),
        (["--tokenizers", "a=released@gpt2"], "no split pattern is called 'gpt2'"),
        (["--tokenizers", "a=released", "--chart=absent/c.png"], "no folder .*absent to write c.png in"),
        (["--tokenizers", "a=released", "--texts", "empty"], "expected LANGUAGE:PATTERN or a folder with a folder"),
        (["--tokenizers", "a=released", "--texts", "en:x", "en:y"], "--texts names en twice: x and y"),
    ],
)
def test_what_cannot_be_compared(compare, texts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("broken.json", "broken.model"):
        Path(name).write_text("nonsense")
    Path("empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.main(["--texts", str(texts), *arguments])


ROFF = r""".\" a comment
.TH LS 1 "Januar 2024"
.SH "ÜBERSICHT"
.B ls
[\fI\,OPTION\/\fP]\&.\|.\|.
.PP
.BR \-a ", " \-\-all
Eintr\(:age mit \(lq.\(rq nicht \fBignorieren\fR; C:\eDOS \[co] \s+1groß\s0
"""


def test_manual_pages_become_text(tool, tmp_path, capsys):
    for name in ("de/man1/ls.1", "man1/ls.1", "de/man5/passwd.5"):
        path = tmp_path / "pages" / "usr" / "share" / "man" / f"{name}.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(ROFF.encode()))
    (tmp_path / "pages/usr/share/man/man1/broken.1.gz").write_bytes(gzip.compress(b"\xff\xfe"))
    damaged = gzip.compress(b"")[:10] + b"\xff" * 20
    (tmp_path / "pages/usr/share/man/man1/damaged.1.gz").write_bytes(damaged)
    tool("manual_pages").main([str(tmp_path / "pages"), str(tmp_path / "out"), "--sections", "1"])
    assert re.search(r"^de 1, en 1\nleft out: 2 pages", capsys.readouterr().out)
    text = (tmp_path / "out" / "de" / "ls.1.txt").read_text(encoding="utf-8")
    assert text == "ÜBERSICHT\nls\n[OPTION]...\n-a, --all\nEintrge mit “.” nicht ignorieren; C:\\DOS © groß\n"
    with pytest.raises(FileNotFoundError, match="no such manual pages"):
        tool("manual_pages").main([str(tmp_path / "out"), str(tmp_path / "out")])


def test_tokenizers_agree_on_what_a_tokenizer_json_counts(compare, vocabulary_file, tmp_path):
    """Special tokens that a post-processor would add are not counted."""
    content = tokenizer_json(Tokenizer(vocabulary_file))
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    model = tokenizers.Tokenizer.from_file(str(path))
    model.post_processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 393)])
    model.enable_truncation(5)
    model.save(str(path))
    assert compare.load_tokenizer(str(path))([ENGLISH]) == len(Tokenizer(vocabulary_file).encode(ENGLISH))
