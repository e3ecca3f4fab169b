"""Tasks that are cached without tf.data, against the same tasks through SeqIO: equal examples, equal files."""

import functools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import cache
from qwen_jax.data.corpora import Corpus
from qwen_jax.data.row_steps import CorpusExamples, RowSteps
from qwen_jax.data.sources import DocumentSource
from qwen_jax.data.task_examples import SeqioExamples, SeqioSteps, WorkerSetup, examples_of, last_steps_of

rekey = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text", "where": "source", "none": ""})
copying = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
plain_tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
STEPS = {
    "the usual ones": [copying, plain_tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos],
    "other fields": [rekey, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()],
    "end before the cache": [copying, plain_tokenize, seqio.preprocessors.append_eos, seqio.CacheDatasetPlaceholder()],
}


def make_task(registry, preprocessors, files, features=None) -> seqio.Task:
    source = DocumentSource(functools.partial(Corpus, files, validation_share=0.3), num_shards=2)
    return seqio.Task("rows", source=source, preprocessors=preprocessors, output_features=features or registry.plain)


@pytest.fixture
def registered():
    """Registers a task for the time of a test."""

    def register(task: seqio.Task) -> seqio.Task:
        seqio.TaskRegistry.remove("rows") if "rows" in seqio.TaskRegistry.names() else None
        return seqio.TaskRegistry.add_provider("rows", task) or task

    yield register
    if "rows" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("rows")


def both_ways(task: seqio.Task, setup: WorkerSetup, split: str) -> tuple[list, list]:
    """Cached examples of all shards by steps on rows and by tf.data."""
    rows, through_tensorflow = [], []
    for index, examples in enumerate(examples_of(task, split, setup)):
        assert isinstance(examples, CorpusExamples)
        rows += examples()
        through_tensorflow += SeqioExamples(setup, split, index, 2)()
    return rows, through_tensorflow


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], value)
            assert isinstance(value, bytes) or one[name].dtype == value.dtype


TEXTS = st.lists(st.text(max_size=40) | st.text("ab \n<|imendoftxs_r>é字😀\ud800", max_size=40), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS, name=st.sampled_from(sorted(STEPS)))
def test_rows_and_tensors_give_the_same(registry, tmp_path_factory, texts, name):
    folder = tmp_path_factory.mktemp("rows")
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::2]))
    task = make_task(registry, STEPS[name], paths)
    seqio.TaskRegistry.add_provider("rows", task)
    try:
        setup = WorkerSetup.of(task, registry.vocabulary, ())
        for split in task.splits:
            rows, tensors = both_ways(task, setup, split)
            assert_equal(rows, tensors)
            last = last_steps_of(task, setup)
            assert isinstance(last, RowSteps)
            features = {"targets": {"shape": [None], "dtype": "int32"}}
            cached = [{"targets": one["targets"]} for one in rows]
            expected = list(SeqioSteps(setup)(iter(cached), features))
            assert_equal(list(last(iter(cached), features)), expected)
    finally:
        seqio.TaskRegistry.remove("rows")


def upper(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: {"text": tf.strings.upper(example["text"])})


OTHERS = {
    "an unknown step": [upper, *STEPS["the usual ones"]],
    "an unknown setting": [
        copying,
        functools.partial(seqio.preprocessors.tokenize, with_eos=True),
        seqio.CacheDatasetPlaceholder(),
    ],
    "another vocabulary": STEPS["the usual ones"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_steps_go_through_seqio(registry, name):
    features = registry.plain
    if name == "another vocabulary":
        features = features | {"inputs": seqio.Feature(seqio.ByteVocabulary(), required=False)}
    task = make_task(registry, OTHERS[name], registry.files["test_a"], features)
    setup = WorkerSetup.of(task, registry.vocabulary, ())
    assert all(isinstance(one, SeqioExamples) for one in examples_of(task, "train", setup))


def test_unknown_steps_leave_the_same_files(registry, tmp_path, registered):
    """A step that changes nothing, but is not known, before and after the cache."""

    def same(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: example)

    steps, files = STEPS["the usual ones"], registry.files["test_a"]
    contents = []
    for name, preprocessors in (("known", steps), ("unknown", [same, *steps, same])):
        registered(make_task(registry, preprocessors, files))
        cache.prepare("rows", cache_dir=tmp_path / name, sequence_length=32, num_shards=2)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in paths})
    assert contents[0] == contents[1] and len(contents[0]) > 8
