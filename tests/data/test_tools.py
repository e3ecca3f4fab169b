"""The tools on tasks, as they are called from the command line."""

import json
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import gin
import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer
from tests.warm_python import python

LENGTH = 32


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten thousand words, some of them non-ASCII."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh你好é12"), generator.integers(1, 8))) for _ in range(400)]
    for index in range(3):
        text = "".join(word + str(generator.choice([" ", "\n", ", ", "  "])) for word in generator.choice(words, 3000))
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tool, corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "v.tiktoken"
    tool("build_tokenizer").main(["--input", str(corpus), "--size=1000", f"--output={path}"])
    gin.clear_config()
    return Tokenizer(path)


@pytest.fixture(scope="module")
def same_in_tokenizers(built) -> tokenizers.Tokenizer:
    """The tokenizer.json that was written beside the ranks."""
    return tokenizers.Tokenizer.from_file(str(built.path.with_name("v.tokenizer.json")))


def test_vocabulary_has_exactly_the_size_asked_for(built):
    assert built.vocab_size == 1000 and built.num_ranks == 1000 - len(CONTROL_TOKENS)
    assert {token for token, rank in built.mergeable_ranks.items() if rank < 256} == {bytes([b]) for b in range(256)}


def test_digits_stay_single(built):
    assert all(sum(char.isdigit() for char in token.decode("utf-8", "ignore")) <= 1 for token in built.mergeable_ranks)


def test_it_compresses(built, corpus):
    text = (corpus / "0.txt").read_text(encoding="utf-8")
    assert len(text.encode()) / len(built.encode(text)) > 2


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("abcdefgh你好é12 \n,")) | st.text(st.characters(codec="utf-8")))
def test_same_ids_in_tiktoken_and_tokenizers(built, same_in_tokenizers, text):
    assume("<|" not in text)  # `tokenizers` reads the names of control tokens in any text
    assert built.encode(text) == same_in_tokenizers.encode(text).ids


def test_same_ids_on_the_corpus(built, same_in_tokenizers, corpus):
    for path in corpus.iterdir():
        text = path.read_text(encoding="utf-8")
        assert built.encode(text) == same_in_tokenizers.encode(text).ids


def test_building_twice_gives_the_same_file(tool, built, corpus, tmp_path, capsys):
    path = tmp_path / "again.tiktoken"
    tool("build_tokenizer").main(["--input", str(corpus / "*.txt"), "--size=1000", f"--output={path}"])
    assert path.read_bytes() == built.path.read_bytes()
    assert re.search(r"again\.tiktoken: 1000 ids \(792 ranks\), \d\.\d+ bytes per token", capsys.readouterr().out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.tiktoken", "again.tokenizer.json"]
    beside = built.path.with_name("v.tokenizer.json")
    assert (tmp_path / "again.tokenizer.json").read_bytes() == beside.read_bytes()


@pytest.mark.parametrize(
    ("size", "message"),
    [(464, "size is 464: it must be above 464"), (60_000, r"expected 59792: train on more text, or ask for a size of")],
)
def test_impossible_sizes(tool, corpus, tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        tool("build_tokenizer").main(["--input", str(corpus), f"--size={size}", f"--output={tmp_path / 'v'}"])
    assert not list(tmp_path.iterdir())


def test_nothing_to_train_on(tool, tmp_path):
    build = tool("build_tokenizer")
    with pytest.raises(ValueError, match="no text to train on"):
        build.train([], 1000)
    with pytest.raises(FileNotFoundError, match="no file of a corpus matches"):
        build.main(["--input", str(tmp_path / "none"), "--size=1000", f"--output={tmp_path / 'v'}"])
    with pytest.raises(FileNotFoundError, match="no file of a corpus matches"):
        build.main(["--input", str(tmp_path / "none"), "--size=1000", f"--output={tmp_path / 'missing' / 'v'}"])
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_output_is_made(tool, corpus, tmp_path):
    build = tool("build_tokenizer")
    build.main(["--input", str(corpus), "--size=480", f"--output={tmp_path / 'new' / 'v.tiktoken'}"])
    assert (tmp_path / "new" / "v.tiktoken").is_file()


def test_building_on_a_base_with_weights(tool, built, corpus, tmp_path, capsys):
    path = tmp_path / "more.tiktoken"
    arguments = [f"--base={built.path}", "--base_ranks=700", "--size=1000", f"--output={path}", "--input"]
    tool("build_tokenizer").main([*arguments, f"en:{corpus}/0.txt", f"zh:{corpus}/[12].txt:2.5"])
    ranks = Tokenizer(path).mergeable_ranks
    assert len(ranks) == 1000 - len(CONTROL_TOKENS)
    assert {t: r for t, r in ranks.items() if r < 700} == {t: r for t, r in built.mergeable_ranks.items() if r < 700}
    shown = capsys.readouterr().out
    assert tool("build_tokenizer").train([], 1000, ranks) == ranks  # no room for more than the base
    assert re.search(r"bytes of en \(weight 1\)\n.*bytes of zh \(weight 2\.5\)\nmore\.tokenizer\.json", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base_ranks=300"], "--base_ranks needs --base"),
        (["--base=released", "--base_ranks=100"], "has 151643 ranks, and 256 are bytes"),
        (["--base=released"], r"size is 1000: it must be above 151851, the 151643 ranks of the base and 208 control"),
        (["--base=absent.tiktoken"], "no vocabulary at absent.tiktoken"),
        (["--input", "zh:x:-1"], "'zh:x:-1' is not PATTERN, LANGUAGE:PATTERN or LANGUAGE:PATTERN:WEIGHT"),
        (["--input", "zh:x:0.0"], "has the weight 0: leave the input out"),
    ],
)
def test_impossible_bases_and_inputs(tool, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tool("build_tokenizer").main(["--size=1000", f"--output={tmp_path / 'v'}", *arguments])
    assert not list(tmp_path.iterdir())


def test_inputs_are_read_as_they_are_written(tool, corpus):
    parse = tool("build_tokenizer").parse_input
    one = parse("zh_TW:corpus/**/*.jsonl:0.25")
    assert (one.language, one.pattern, one.weight) == ("zh_TW", "corpus/**/*.jsonl", Fraction(1, 4))
    assert (parse("corpus/*").language, parse("corpus/*").pattern) == ("text", "corpus/*")
    assert parse(str(corpus)).pattern == str(corpus)


def test_cache_task_from_the_command_line(tool, vocabulary_file, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    arguments = [
        "local_files",
        f"--cache_dir={tmp_path / 'cache'}",
        "--sequence_length=32",
        "--splits=train",
        f"--gin.local_files.pattern={tmp_path / '*.jsonl'}",
        f"--gin.vocabulary_path.path={vocabulary_file}",
        "--beam.runner=FnApiRunner",
    ]
    tool("cache_task").main(arguments)
    assert re.search(r"local_files +train +\d+ +\d+ +\d+ +\d\.\d+", capsys.readouterr().out)
    assert (tmp_path / "cache" / "local_files" / "packed-32" / "train" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gin.nonsense.path=1"], "nonsense"),
        (["--gin_file=absent.gin"], "absent.gin"),
        (["--beam.runer=FlinkRunner"], "Beam has no option --runer. Did you mean --runner?"),
    ],
)
def test_misspelt_configuration(tool, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        tool("cache_task").main(["python_corpus", f"--cache_dir={tmp_path}", "--sequence_length=32", *extra])


def test_a_bad_row_is_named_in_one_line(tool, vocabulary_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    arguments = [
        "local_files",
        f"--gin.local_files.pattern={tmp_path}",
        f"--gin.vocabulary_path.path={vocabulary_file}",
    ]
    with pytest.raises(ValueError) as error:
        tool("inspect_task").main(arguments)
    assert str(error.value) == f"{tmp_path / 'a.jsonl'}:2: expected an object with a field 'text', found body"


def test_errors_are_one_line(tmp_path):
    command = [python(), "tools/inspect_task.py", "local_files"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "=== local_files train; first 200 documents\n"
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: local_files does not know which files")


def test_marks_of_loss_and_control(tool, vocabulary_file):
    tokenizer, render = Tokenizer(vocabulary_file), tool("inspect_task").render
    ids = tokenizer.encode_with_control_tokens("<|im_start|>a<|im_end|>")
    ids += tokenizer.encode("<|im_end|>")
    weights = [1, 0, 1] + [0] * (len(ids) - 3)
    assert render(ids, weights, tokenizer, color=False) == "⟦⟪<|im_start|>⟫⟧a⟦⟪<|im_end|>⟫⟧<|im_end|>"
    coloured = render(ids, weights, tokenizer, color=True)
    assert coloured.count("\x1b[32m") == 4 and re.sub(r"\x1b\[\d+m", "", coloured) == tokenizer.decode(ids)


@given(text=st.text())
def test_untrusted_text_does_not_control_the_terminal(tool, text):
    shown = tool("inspect_task").escape(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", shown)


def test_escapes_are_readable(tool):
    assert tool("inspect_task").escape("\x1b[31m\r\u202e é\n\t你") == "\\x1b[31m\\r\\u202e é\n\t你"


def test_inspect_an_uncached_task(tool, registry, vocabulary_file, capsys):
    tool("inspect_task").main(["test_mixture", "--num_examples=1", f"--gin.vocabulary_path.path={vocabulary_file}"])
    shown = capsys.readouterr().out
    assert "=== test_a train, 70.00% of test_mixture" in shown and "=== test_b train, 30.00%" in shown
    assert "⟪<|endoftext|>⟫⟧" in shown and "tokens with loss:       100.0%" in shown
    assert re.search(r"tokens per document: +5% \d+ +50% \d+", shown)


def test_inspect_packed_examples(tool, cache_dir, vocabulary_file, capsys):
    arguments = [
        "test_chat",
        f"--cache_dir={cache_dir}",
        "--sequence_length=32",
        "--max_tokens=8",
        f"--gin.vocabulary_path.path={vocabulary_file}",
    ]
    tool("inspect_task").main(arguments)
    shown = capsys.readouterr().out
    assert "--- example 0: 32 tokens" in shown and "… 24 more tokens" in shown
    share = float(re.search(r"tokens with loss: +([\d.]+)%", shown)[1])
    assert 35 < share < 50


def test_inspect_says_what_is_missing(tool, registry, cache_dir, vocabulary_file):
    inspect = tool("inspect_task").main
    with pytest.raises(ValueError, match="--cache_dir needs --sequence_length"):
        inspect(["test_a", f"--cache_dir={cache_dir}"])
    with pytest.raises(ValueError, match="made with the vocabulary .*set vocabulary_path.path"):
        inspect(["test_a", f"--cache_dir={cache_dir}", "--sequence_length=32"])
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        inspect(["test_a", "--split=test"])
    with pytest.raises(ValueError, match="'misspelt' is neither a task nor a mixture"):
        inspect(["misspelt"])
