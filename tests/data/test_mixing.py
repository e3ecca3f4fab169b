"""Mixing rates: those of SeqIO, tasks that contribute nothing, and rates that cannot be used."""

import functools
import shutil

import pytest
import seqio

from qwen_jax.data import cache
from qwen_jax.data.loader import ExampleLoader

LENGTH = 32


@pytest.fixture
def add_mixture(registry):
    """Registers a mixture until the end of the test."""
    names = []

    def add(name, rates):
        seqio.MixtureRegistry.add(name, rates)
        names.append(name)

    yield add
    for name in names:
        seqio.MixtureRegistry.remove(name)


@pytest.fixture(autouse=True)
def no_global_cache(registry, monkeypatch):
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [])


def test_a_task_of_rate_zero_contributes_nothing(add_mixture, cache_dir, tmp_path):
    shutil.copytree(cache_dir / "test_a", tmp_path / "test_a")
    add_mixture("only_a", [("test_a", 1), ("test_b", 0)])
    prepared = cache.prepare("only_a", cache_dir=tmp_path, sequence_length=LENGTH, splits=("train",))
    assert [one.manifest.task for one in prepared] == ["test_a"] and not (tmp_path / "test_b").exists()
    assert ExampleLoader("only_a", cache_dir=tmp_path, sequence_length=LENGTH).rates == {"test_a": 1}


def test_rates_by_characters_are_those_of_the_texts(registry, add_mixture, cache_dir):
    from qwen_jax.data.corpora import documents, in_validation

    add_mixture("by_size", [(name, seqio.mixing_rate_num_characters) for name in ("test_a", "test_b")])
    loader = ExampleLoader("by_size", cache_dir=cache_dir, sequence_length=LENGTH)
    texts = {name: [d["text"] for d in documents(registry.files[name])] for name in ("test_a", "test_b")}
    characters = {name: sum(len(t) for t in found if not in_validation(t, 0.2)) for name, found in texts.items()}
    expected = characters["test_a"] / sum(characters.values())
    assert loader.rates["test_a"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([("test_a", 1), ("test_b", -1)], "refused: the rate of test_b is -1.0: each must be 0 or at least 1e-05"),
        ([("test_a", 1), ("test_b", 1e-7)], "refused: the rate of test_b is 1e-07: each must be 0 or at least 1e-05"),
        ([("test_a", 1), ("test_b", float("nan"))], "refused: the rate of test_b is no finite number"),
        ([("test_a", 0), ("test_b", 0)], "refused: all rates are 0"),
    ],
)
def test_rates_that_cannot_be_used_are_refused_before_caching(add_mixture, tmp_path, rates, message):
    add_mixture("refused", rates)
    with pytest.raises(ValueError, match=message):
        cache.prepare("refused", cache_dir=tmp_path, sequence_length=LENGTH)
    assert not list(tmp_path.iterdir())


def test_a_statistic_that_a_cache_lacks_is_named(add_mixture, cache_dir):
    rate = functools.partial(seqio.mixing_rate_num_characters, char_count_name="inputs_chars")
    add_mixture("by_inputs", [("test_a", rate), ("test_b", 1)])
    with pytest.raises(ValueError, match="rate of test_a depends on 'inputs_chars', which the statistics of its cache"):
        ExampleLoader("by_inputs", cache_dir=cache_dir, sequence_length=LENGTH)


def test_held_out_examples_of_a_mixture_are_those_that_there_are(cache_dir, tmp_path, caplog):
    shutil.copytree(cache_dir, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "test_b" / "packed-32" / "validation")
    where = {"cache_dir": tmp_path / "cache", "sequence_length": LENGTH}
    loader = ExampleLoader("test_mixture", split="validation", repeat=False, **where)
    assert loader.rates == {"test_a": 1} and "validation has no examples of test_b" in caplog.text
