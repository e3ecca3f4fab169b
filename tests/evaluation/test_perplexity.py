"""Log-probabilities by sliding windows against a plain forward pass, and what is counted by language and domain."""

import json
import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.evaluation.perplexity import Text, log_probs, measure, windows
from qwen_jax.inference import Engine
from tests.fakes import random_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    return random_run(folder, hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=32)


@pytest.fixture(scope="module")
def engine(run):
    return Engine(*load_pretrained(run), load_tokenizer(run), slots=1)


@pytest.fixture(scope="module")
def plain(run):
    """Log-probabilities of each token after the first, by one training forward pass."""
    model, params = load_pretrained(run)
    # Rows are as long as the context, so that there is one program; what stands after a token does not matter.
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))

    def log_probs_of(ids):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(forward(row))[0][np.arange(len(ids) - 1), ids[1:]]

    return log_probs_of


@hypothesis.given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_token_is_predicted_once_with_the_context_that_is_stated(length, context_length, data):
    stride = data.draw(st.integers(1, context_length - 1))
    predicted = []
    for begin, start, end in windows(length, context_length, stride):
        assert 0 <= begin < start < end and end - begin <= context_length
        assert begin == 0 or start - begin >= context_length - stride
        predicted += range(start, end)
    assert predicted == list(range(1, length))


def test_short_sequences_are_those_of_a_forward_pass(engine, plain):
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 256, length).tolist() for length in (2, 32, 17, 1, 5)]
    found = log_probs(engine, sequences)
    assert [len(one) for one in found] == [1, 31, 16, 0, 4]
    for ids, values in zip(sequences, found, strict=True):
        np.testing.assert_allclose(values, plain(ids), atol=1e-4)


@pytest.mark.parametrize("stride", [1, 11, 16, 31])
def test_long_sequences_are_those_of_an_independent_loop(engine, plain, stride):
    ids = np.random.default_rng(1).integers(0, 256, 100).tolist()
    expected, done = [], 1
    for end in [*range(32, 100, stride), 100]:
        part = plain(ids[max(0, end - 32) : end])
        expected += part[len(part) - (end - done) :].tolist() if end > done else []
        done = end
    (found,) = log_probs(engine, [ids], stride)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_more_context_than_asked_for_is_not_used(engine, plain):
    ids = np.random.default_rng(2).integers(0, 256, 24).tolist()
    (found,) = log_probs(engine, [ids], stride=4, context_length=8)
    np.testing.assert_allclose(found[:7], plain(ids[:8]), atol=1e-4)
    np.testing.assert_allclose(found[7:11], plain(ids[4:12])[3:], atol=1e-4)
    for stride in (0, 8):
        with pytest.raises(ValueError, match="the stride must be from 1 to 7"):
            log_probs(engine, [ids], stride=stride, context_length=8)


def test_texts_are_counted_by_group(engine, plain):
    end = engine.tokenizer.endoftext_id
    texts = [Text("abc", "en", "web"), Text("d", "en", "web"), Text("", "en", "web"), Text("问", "zh")]
    tallies, left_out = measure(engine, texts)
    assert left_out == {"no text": 1} and tallies.keys() == {("en", "web"), ("zh", "")}
    english = tallies["en", "web"]
    loss = -sum(float(plain([end, *text.encode()]).sum()) for text in ("abc", "d"))
    assert (english.documents, english.size, english.tokens) == (2, 4, 4)
    assert english.loss == pytest.approx(loss, abs=1e-3)
    assert english.perplexity == pytest.approx(math.exp(loss / 4)) and english.bytes_per_token == 1
    assert english.bits_per_byte == pytest.approx(loss / 4 / math.log(2))
    assert (tallies["zh", ""].documents, tallies["zh", ""].size) == (1, 3)


def test_names_of_control_tokens_are_text(engine):
    tallies, _ = measure(engine, [Text("<|endoftext|>")])
    assert tallies["", ""].tokens == len("<|endoftext|>")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "en" / "books").mkdir(parents=True)
    (folder / "zh").mkdir()
    (folder / "en" / "books" / "1.txt").write_text("a book " * 20)
    (folder / "zh" / "2.md").write_text("一本书")
    rows = [
        {"text": "int x;", "language": "c", "domain": "code"},
        {"text": "hello", "language": "en"},
        {"text": ""},
        {"text": "no label", "domain": None},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command_prints_and_writes_a_row_for_each_group(tool, run, texts, tmp_path, capsys):
    command = tool("measure_perplexity")
    output = tmp_path / "out"
    command.main(["--checkpoint", str(run), "--texts", str(texts), "--stride=8", "--output", str(output)])
    said = capsys.readouterr().out
    assert "windows of 32 tokens, 8 apart" in said and "left out, no text: 1" in said
    content = json.loads((output / "perplexity.json").read_text())
    found = {(one["language"], one["domain"]): one for one in content["groups"]}
    assert found.keys() == {("c", "code"), ("en", ""), ("en", "books"), ("zh", ""), ("", "")}
    assert found["en", "books"]["tokens"] == found["en", "books"]["size"] == 140 and content["left_out"] == {
        "no text": 1
    }
    assert (output / "perplexity.md").read_text().strip() == said.strip()
    assert "| en | all | 2 | 145 |" in said and "| all | all | 5 |" in said
    with pytest.raises(ValueError, match="the stride must be from 1 to 31, one less than the context; found 0"):
        command.main(["--checkpoint", str(run), "--texts", str(texts), "--stride=0"])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'language' is int, expected a string"):
        (texts / "rows.jsonl").write_text('{"text": "x", "language": 3}\n')
        command.main(["--checkpoint", str(run), "--texts", str(texts)])
