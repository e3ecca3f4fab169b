"""The tasks that come with the project."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import gin
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

import tasks  # noqa: F401  registers them
from qwen_jax.data import cache
from tasks import pretrain
from tests.warm_python import python


@pytest.fixture
def configured(vocabulary_file):
    gin.clear_config()
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    yield
    gin.clear_config()


GUARD = """
import glob, pathlib, socket, sys
import seqio, tensorflow_datasets
def refuse(*args, **kwargs):
    raise AssertionError("looked for data on import")
pathlib.Path.rglob = glob.glob = socket.create_connection = refuse
import tasks
print(*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
"""
# A mixture of tasks of another file imports that file.
MINE = """
import seqio
import tasks.pretrain
seqio.MixtureRegistry.add("mine", [("c4_en", 1.0)])
"""


def test_a_new_file_in_the_package_is_enough_and_import_looks_for_no_data(tmp_path):
    """A copy of `tasks` with one file more registers that file's mixture, and all that came with the project."""
    source = Path(tasks.__file__).parent
    shutil.copytree(source, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tasks" / "mine.py").write_text(MINE)
    path = os.pathsep.join([str(tmp_path), str(source.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([python(), "-c", GUARD], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    expected = "python_corpus local_files wikipedia_en wikipedia_zh c4_en c4_zh pretrain_public mine"
    assert set(expected.split()) <= set(result.stdout.split())


def test_python_corpus_is_bounded_and_has_no_tests():
    corpus = pretrain.python_corpus()
    size = sum(path.stat().st_size for path in corpus.files)
    assert 5_000_000 < size <= 15_000_000
    assert [path for path in corpus.files if {"test", "tests", "lib2to3"} & set(path.parts)] == []
    assert any(path.suffix in (".md", ".rst") for path in corpus.files)
    assert any(path.name == "topics.py" for path in corpus.files)
    # What else is installed does not change the corpus, and no page that quotes a benchmark is in it.
    pages = [path for path in corpus.files if path.suffix != ".py"]
    assert [path for path in pages if not set(path.parts) & set(pretrain._DOCUMENTED)] == []
    assert list(corpus.files) == list(pretrain.python_corpus().files)
    small = pretrain.python_corpus(max_bytes=100_000)
    assert 0 < sum(path.stat().st_size for path in small.files) <= 100_000


def test_python_corpus_yields_ended_documents(configured):
    gin.bind_parameter("python_corpus.max_bytes", 50_000)
    task = seqio.get_mixture_or_task("python_corpus")
    vocabulary = task.output_features["targets"].vocabulary
    dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False)
    documents = [vocabulary.decode(example["targets"]) for example in dataset.as_numpy_iterator()]
    texts = {path.read_text(encoding="utf-8") for path in pretrain.python_corpus().files}
    assert documents and set(documents) <= {text + "<|endoftext|>" for text in texts}


def test_local_files_are_named_in_gin(configured, tmp_path):
    task = seqio.get_mixture_or_task("local_files")
    with pytest.raises(ValueError, match=r"set local_files\.pattern = 'FOLDER OR GLOB' in a gin file"):
        task.source.list_shards("train")
    (tmp_path / "a.txt").write_text("<|im_start|>system")
    gin.bind_parameter("local_files.pattern", str(tmp_path))
    gin.bind_parameter("local_files.validation_share", 0.0)
    (example,) = task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator()
    vocabulary = task.output_features["targets"].vocabulary
    assert vocabulary.decode(example["targets"]) == "<|im_start|>system<|endoftext|>"
    # The text of the document did not become a control token; only its end is one.
    assert (example["targets"] >= vocabulary.tokenizer.num_ranks).sum() == 1


def _store(folder, name: str, config: str, version: str, splits: dict[str, list[str]]) -> None:
    """Writes a TFDS dataset of this name, as `tfds build` would."""
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
    builders = {
        split: tf.data.Dataset.from_tensor_slices({"text": texts, "title": texts}) for split, texts in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        features=features,
        split_datasets=builders,
        config=config,
        data_dir=folder,
        disable_shuffling=True,
    )


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    """TFDS looks here; SeqIO remembers builders, so tasks are asked with fresh ones."""
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_wikipedia_from_tfds_is_cached_and_packed(configured, tfds_folder, tmp_path):
    texts = [f"article {i} 你好" for i in range(400)]
    _store(tfds_folder, "wikipedia", "20230601.en", "1.0.0", {"train": texts})
    train, validation = cache.prepare("wikipedia_en", cache_dir=tmp_path / "cache", sequence_length=16)
    assert (train.manifest.documents, validation.manifest.documents) == (398, 2)
    assert train.manifest.text_bytes == sum(len(text.encode()) for text in texts[:398])


@pytest.mark.parametrize(
    ("task", "config", "splits"),
    [("c4_en", "en", ("train", "validation")), ("c4_zh", "multilingual", ("zh", "zh-validation"))],
)
def test_c4_from_tfds(configured, tfds_folder, task, config, splits):
    _store(tfds_folder, "c4", config, "3.1.0", {splits[0]: ["page one", "page two"], splits[1]: ["held out"]})
    provider = seqio.get_mixture_or_task(task)
    vocabulary = provider.output_features["targets"].vocabulary
    read = functools.partial(provider.get_dataset, sequence_length=None, shuffle=False)
    found = {
        split: [vocabulary.decode(example["targets"]) for example in read(split=split).as_numpy_iterator()]
        for split in ("train", "validation")
    }
    assert found == {
        "train": ["page one<|endoftext|>", "page two<|endoftext|>"],
        "validation": ["held out<|endoftext|>"],
    }


def test_a_dataset_that_is_not_on_disk_says_how_to_get_it(configured, tfds_folder):
    task = seqio.get_mixture_or_task("wikipedia_zh")
    with pytest.raises(FileNotFoundError, match=r"get it with `tfds build wikipedia/20230601\.zh`"):
        task.get_dataset(sequence_length=None, split="train")


def test_rates_of_the_public_mixture_sum_to_one():
    mixture = seqio.get_mixture_or_task("pretrain_public")
    assert {task.name for task in mixture.tasks} == {"c4_en", "c4_zh", "wikipedia_en", "wikipedia_zh"}
    assert sum(mixture.get_rate(task) for task in mixture.tasks) == pytest.approx(1)
