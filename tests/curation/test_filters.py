"""Rules, scores, benchmarks and sampling."""

import gzip
import json
import math
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.curation import contamination, normalize, quality, sampling, scoring
from qwen_jax.curation.configuration import benchmarks

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="module")
def articles(tool):
    make, generator = tool("make_crawl"), random.Random(3)
    return {"en": make.english(generator, 30), "zh": make.chinese(generator, 30)}


RULES = {"en": quality.Rules(), "zh": quality.CHINESE}


def broken(text: str, language: str = "en") -> str | None:
    return RULES[language].broken(quality.statistics(text, language))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_articles_pass(articles, language):
    assert broken(articles[language], language) is None


def test_each_rule_drops_what_it_is_for(articles):
    text = articles["en"]
    lines = text.split("\n")
    cases = {
        "min_tokens": lines[0][:200] + ".",
        "max_tokens": text * 300,
        "max_mean_token_length": "supercalifragilistic antidisestablishment " * 40,
        "min_mean_token_length": " ".join("a b c d e f g".split() * 20),
        "max_symbol_share": text.replace(" ", " {} "),
        "max_digit_share": text.replace(" ", " 12345 "),
        "min_letter_share": text.replace(" ", " - "),
        "min_terminal_share": text.replace(".", ",").replace("\n", ",\n"),
        "max_ellipsis_share": text.replace(".\n", " …\n"),
        "max_bullet_share": "\n".join("• " + line for line in lines),
        "max_duplicate_line_share": text + "\nread more\n" * 15,
        "max_duplicate_line_characters": "\n".join([*lines, *map("Item {}.".format, range(20)), *lines[:3]]),
        "min_stop_words": " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(90)) + ".",
    }
    for rule, changed in cases.items():
        assert broken(changed) == rule, rule
    assert quality.Rules(min_tokens=None).broken(quality.statistics(cases["min_tokens"], "en")) is None


def test_repetition_is_measured_in_ngrams():
    values = quality.statistics("one two three four five six seven eight nine ten " * 4, "en")
    assert values["tokens"] == 40
    assert values["duplicate_5gram"] == pytest.approx(1 - 10 / 36, abs=1e-4)
    assert values["top_2gram"] == pytest.approx(2 * 4 / 40, abs=1e-4)


def test_chinese_is_counted_in_characters():
    values = quality.statistics("今天天气很好。我们去散步！", "zh")
    assert values["tokens"] == 11 and values["terminal_share"] == 1 and "letter_share" in values


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["en", "zh", "de"]))
def test_statistics_of_any_text_are_numbers_within_their_range(text, language):
    for name, value in quality.statistics(text, language).items():
        assert math.isfinite(value) and value >= 0
        if name.endswith(("share", "gram", "characters")):
            assert value <= 1


@settings(max_examples=200)
@given(
    st.text(
        st.sampled_from("ab C1２ß,.\n\x1c 你好。é٣²Ⅷ#{•…😀\u0378\ufdd0\U000e0100\U000f0000\U0010ffff"), max_size=120
    )
)
def test_statistics_are_those_of_loops_over_characters_and_tokens(text):
    found = quality.statistics(text, "en")
    tokens = normalize.tokenize([text]).hashes.tolist()
    pieces = text.split()

    def symbol(one):
        return one in "#{}<>|\\^~=+_[]" or unicodedata.category(one) in ("So", "Sk", "Cn")

    expected = {
        "symbol_share": sum(map(symbol, text)) / max(len(text), 1),
        "digit_share": sum(map(str.isdigit, text)) / max(len(text), 1),
    }
    if tokens:
        expected["mean_token_length"] = sum(map(str.isalnum, text)) / len(tokens)
    if pieces:
        expected["letter_share"] = sum(any(map(str.isalpha, piece)) for piece in pieces) / len(pieces)
    for size in (2, 3, 4, 5, 10):
        grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
        most = max(map(grams.count, grams), default=0)
        if size < 5 and len(tokens) >= size * 5:
            expected[f"top_{size}gram"] = most * size / len(tokens) if most > 1 else 0.0
        if size >= 5 and grams:
            expected[f"duplicate_{size}gram"] = 1 - len(set(grams)) / len(grams)
    grams = {name for name in found if name.endswith("gram")}
    assert grams == {name for name in expected if name.endswith("gram")}
    assert {name: found[name] for name in expected} == {name: round(value, 4) for name, value in expected.items()}


def test_flags_of_all_characters():
    flags = quality.character_flags().tolist()
    for point in range(0, 0x110000):
        one = chr(point)
        symbol = one in "#{}<>|\\^~=+_[]" or unicodedata.category(one) in ("So", "Sk", "Cn")
        bits = one.isalnum(), one.isalpha(), one.isdigit(), symbol, one.isspace()
        assert flags[point] == sum(bit << place for place, bit in enumerate(bits)), hex(point)


def test_rules_have_bounds_by_statistic():
    bounds = quality.Rules().bounds()
    assert bounds["tokens"] == (50, 100_000) and bounds["digit_share"] == (None, 0.2)


def test_a_classifier_gives_the_probabilities_of_scikit_learn(tool, crawl, tmp_path):
    trainer = tool("train_quality_classifier")
    texts, labels = trainer.read_examples(str(crawl / "examples.jsonl"), "quality")
    model, classes, measures = trainer.train(texts, labels, bits=14)
    assert classes == ["0", "1"] and measures["ROC AUC"] > 0.99
    path = tmp_path / "quality.npz"
    scoring.save_linear(path, model.coef_[0], float(model.intercept_[0]), bits=14, classes=classes)
    scorer = scoring.LinearClassifier(str(path))
    expected = model.predict_proba(trainer.matrix(texts[:40], 14))[:, 1]
    np.testing.assert_allclose([scorer(text) for text in texts[:40]], expected, atol=1e-5)
    assert 0 <= scorer("") <= 1


def test_training_refuses_labels_it_cannot_use(tool, tmp_path):
    trainer = tool("train_quality_classifier")
    with pytest.raises(ValueError, match="two different labels"):
        trainer.train(["a", "b", "c"], [1, 2, 3])
    with pytest.raises(ValueError, match="label more"):
        trainer.train(["a b"] * 8, [0, 1] * 4)
    (tmp_path / "x.jsonl").write_text('{"text": "a", "other": 1}\n')
    with pytest.raises(ValueError, match="x.jsonl:1"):
        trainer.read_examples(str(tmp_path / "*.jsonl"), "label")


def test_perplexity_is_that_of_the_definition(tmp_path):
    """Witten-Bell by dictionaries, on texts small enough that no two n-grams share a place."""
    texts, order = ["abracadabra", "a banana and a cabana", "天气很好天气"], 3
    path = tmp_path / "ngrams.npz"
    assert scoring.train_ngram(texts, path, order=order, bits=18) == sum(map(len, texts))
    grams, followers = {}, {}
    for text in texts:
        padded = "\0" * (order - 1) + text
        for place in range(order - 1, len(padded)):
            for length in range(order):
                context = padded[place - length : place]
                grams[context, padded[place]] = grams.get((context, padded[place]), 0) + 1
                followers.setdefault((length, context), set()).add(padded[place])
    totals = {}
    for (context, _), number in grams.items():
        totals[context] = totals.get(context, 0) + number

    def perplexity(text):
        padded, loss = "\0" * (order - 1) + text, 0.0
        for place in range(order - 1, len(padded)):
            probability = 1 / 0x110000
            for length in range(order):
                context = padded[place - length : place]
                if total := totals.get(context, 0):
                    kinds = len(followers[length, context])
                    seen = grams.get((context, padded[place]), 0)
                    probability = (seen + kinds * probability) / (total + kinds)
            loss -= math.log(probability)
        return math.exp(loss / len(text))

    scorer = scoring.NgramPerplexity(str(path))
    for text in ("banana", "abc xyz", "天气", "cabana and"):
        assert scorer(text) == pytest.approx(perplexity(text), rel=1e-4)
    assert scorer("") == math.inf
    assert scorer("banana") < scorer("nbaaan")


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a model"):
        scoring.NgramPerplexity(str(tmp_path / "x.npz"))("text")
    scoring.save_linear(tmp_path / "y.npz", np.zeros(256), 0, bits=8, classes=["a", "b"])
    with pytest.raises(ValueError, match="expected a file of"):
        scoring.NgramPerplexity(str(tmp_path / "y.npz"))("text")
    with pytest.raises(FileNotFoundError):
        scoring.LinearClassifier(str(tmp_path / "z.npz"))("text")


def test_a_model_that_was_trained_again_is_read_again(tmp_path):
    path = tmp_path / "model.npz"
    for text in ("abcdefgh" * 40, "hgfedcba" * 40):
        scoring.train_ngram([text], path, order=3, bits=12)
        assert scoring.NgramPerplexity(path)(text) < 1.5
    for bias in (-3.0, 3.0):
        scoring.save_linear(path, np.zeros(256), bias, bits=8, classes=["a", "b"])
        assert scoring.LinearClassifier(path)("text") == pytest.approx(1 / (1 + math.exp(-bias)))


def test_bounds_of_a_score():
    one = scoring.ScoreFilter("perplexity", len, maximum=5, languages=("en",))
    assert one.broken(5) is None and one.broken(6) == one.broken(math.nan) == "max_perplexity"
    assert one.wants("en") and not one.wants("zh")


QUESTION = "A baker makes forty loaves in the morning and sells three quarters of them before noon each day"


def test_documents_that_share_a_long_ngram_are_found(tmp_path):
    rows = [{"question": QUESTION, "choices": ["yes", {"why": CHINESE_ANSWER}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = contamination.ContaminationConfig(files=(str(tmp_path / "a.jsonl"),))
    index = contamination.index(config)

    def shared(text):
        return contamination.shared(normalize.tokenize([text]), index, config)

    words = QUESTION.split()
    assert shared("He said: " + QUESTION.upper().replace(" ", ",  ") + "!") == len(words) - 12
    assert shared("so " + " ".join(words[:13]) + " it was") == 1
    assert shared("so " + " ".join(words[:12]) + " it was") == 0
    assert shared("他说" + CHINESE_ANSWER) == len(CHINESE_ANSWER) - 25
    assert shared(CHINESE_ANSWER[:25]) == 0
    assert shared("") == 0


CHINESE_ANSWER = "面包师早上做了四十个面包中午以前卖掉了四分之三然后又烤了剩下的一半那么多"


@pytest.mark.parametrize("name", ["a.json", "several.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_benchmarks_are_read_as_they_are_published(name, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"q": [QUESTION], "choices": [["x", "y"]]}), path)
    else:
        content = {
            "a.jsonl.gz": json.dumps({"chosen": QUESTION}),
            "A[1].JSONL.GZ": "\ufeff" + json.dumps({"chosen": QUESTION}),
            "a.json": json.dumps({"examples": [{"input": QUESTION}]}),
            "several.json": json.dumps({"id": 1}, indent=1) + "\n" + json.dumps({"text": QUESTION}, indent=1) + "\n",
            "a.csv": f'"{QUESTION}",A,B\n',
            "a.tsv": f"{QUESTION}\tA\n",
            "a.txt": QUESTION,
        }
        data = content[name].encode()
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    (found,) = benchmarks(str(path)).files
    assert QUESTION in list(contamination.benchmark_texts(found))


def test_benchmarks_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json"):
        list(contamination.benchmark_texts(str(tmp_path / "a.json")))
    (tmp_path / "c.json").write_text('{"a": "b"} {"a": ')
    with pytest.raises(ValueError, match="c.json"):
        list(contamination.benchmark_texts(str(tmp_path / "c.json")))
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(ValueError, match="no text in the benchmark files"):
        contamination.index(contamination.ContaminationConfig(files=(str(tmp_path / "b.txt"),)))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the benchmark files beside the repository")
def test_questions_of_real_benchmarks_are_found():
    config = benchmarks(str(SHARED / "data"))
    index = contamination.index(config)
    names = {Path(path).name for path in config.files}
    assert {"HumanEval.jsonl.gz", "word_sorting.json"} <= names and "LICENSE_NOTE.txt" not in names
    rows = [json.loads(line) for line in (SHARED / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()[:50]]
    long = [row["question"] for row in rows if len(row["question"].split()) > 20]
    for text in long:
        assert contamination.shared(normalize.tokenize([f"Homework: {text} Thanks!"]), index, config)
    assert not contamination.shared(normalize.tokenize([Path(contamination.__file__).read_text()]), index, config)


def test_copies_are_as_many_as_the_weight_on_average():
    ids = [f"web/a#{number}" for number in range(4000)]
    for weight in (0, 0.3, 1, 2.5):
        numbers = [sampling.copies(one, weight) for one in ids]
        assert abs(np.mean(numbers) - weight) < 0.03
        assert set(numbers) <= {int(weight), int(weight) + 1}
        assert numbers == [sampling.copies(one, weight) for one in ids]
    with pytest.raises(ValueError, match="weight"):
        sampling.copies("x", -1)
