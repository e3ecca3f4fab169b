"""Benchmarks from their TFDS datasets: hand-made rows, encoded and decoded by the features of the dataset itself."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tasks  # noqa: F401
from qwen_jax.evaluation.benchmark import Choices
from qwen_jax.evaluation.benchmark_tasks import benchmarks, read_examples
from tests.evaluation.published import FILES

# GSM8K's shots are the publisher's own rows, found by their hashes: test_generation_benchmarks.py has it.
NAMES = sorted(name for name, benchmark in benchmarks().items() if benchmark.tfds and name != "gsm8k")


def arrays(value):
    """A row as TFDS encodes it, with lists as arrays, since a generator gives these only."""
    if isinstance(value, dict):
        return {name: arrays(one) for name, one in value.items()}
    if isinstance(value, list):
        return np.array([one.item() if isinstance(one, np.ndarray) else one for one in value])
    return value


@pytest.fixture
def prepared(monkeypatch):
    """Makes rows of TFDS datasets that would be downloaded: gives a function of the rows by split."""

    def prepare(rows):
        def as_dataset(builder, split, **_):
            features = builder.info.features
            encoded = [arrays(features.encode_example(row)) for row in rows[split]]
            return tf.data.Dataset.from_generator(lambda: encoded, output_signature=features.get_tensor_spec())

        monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda builder, **_: None)

    return prepare


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_tfds_dataset_become_examples(name, prepared):
    benchmark = benchmarks()[name]
    prepared(FILES[name].tfds)
    examples = list(read_examples(benchmark, None))
    assert examples and len({example.id for example in examples}) == len(examples)
    for example in examples:
        assert example.prompt.count(FILES[name].shot) == benchmark.shots + 1
        assert isinstance(example.prompt, str) and all(isinstance(choice, str) for choice in example.choices)
        if isinstance(benchmark.answered_by(example), Choices):
            assert example.target in range(len(example.choices))


def test_targets_are_the_labels_of_the_rows(prepared):
    prepared(FILES["arc_easy"].tfds)
    assert [example.target for example in read_examples(benchmarks()["arc_easy"], None)] == [1, 3, 0]
    prepared(FILES["boolq"].tfds)
    found = list(read_examples(benchmarks()["boolq"], None))
    assert [example.target for example in found] == [0, 1, 0]
    assert found[0].prompt == "It -- It is one.\nQuestion: is it 0?\n"


def test_a_benchmark_without_a_tfds_dataset_asks_for_files():
    with pytest.raises(ValueError, match=r"siqa has no TFDS dataset: give --data_dir, a folder with siqa/"):
        next(read_examples(benchmarks()["siqa"], None))
