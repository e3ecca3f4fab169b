"""Caching and packing on Beam, end to end; what is reused, what is refused, and what a failure leaves behind."""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import threading

import gin
import numpy as np
import pytest
import seqio

from qwen_jax import files, workers
from qwen_jax.batch_spec import token_columns
from qwen_jax.data import cache, packing
from qwen_jax.data.corpora import Corpus, documents, in_validation
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.sources import DocumentSource
from qwen_jax.data.task_examples import WorkerSetup
from qwen_jax.data.tokenizer import PinnedTokenizer, Tokenizer, write_ranks
from qwen_jax.data.vocabulary import QwenVocabulary
from tests.warm_python import python

LENGTH = 32
THREADS = ("--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=3")


def _texts(registry, task: str, split: str) -> list[str]:
    texts = [document["text"] for document in documents(registry.files[task])]
    return [text for text in texts if in_validation(text, 0.2) == (split == "validation")]


def _files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def add_task(registry):
    """Registers a task over given files, or any source, until the end of the test."""
    names = []

    def add(name, source_or_files, *, share=0.0, vocabulary=None, **changes):
        source = source_or_files
        if not isinstance(source, seqio.DataSource):
            source = DocumentSource(functools.partial(Corpus, source_or_files, validation_share=share))
        features = registry.plain
        if vocabulary:
            features = {"targets": seqio.Feature(vocabulary, add_eos=True, dtype=features["targets"].dtype)}
        settings = {
            "source": source,
            "preprocessors": registry.steps(seqio.preprocessors.append_eos),
            "output_features": features,
        }
        seqio.TaskRegistry.add(name, **(settings | changes))
        names.append(name)

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_examples_hold_every_document_once(registry, cache_dir, split):
    tokenizer = Tokenizer(registry.vocabulary.tokenizer.path)
    manifest = packing.Manifest.load(packing.packed_folder(cache_dir, "test_a", LENGTH, split))
    texts = _texts(registry, "test_a", split)
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokens == manifest.loss_tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert (manifest.vocab_size, manifest.vocabulary_fingerprint) == (600, tokenizer.fingerprint)
    assert [column.dtype for column in manifest.columns] == ["uint16", "uint8"]
    loader = ExampleLoader(
        "test_a", cache_dir=cache_dir, sequence_length=LENGTH, split=split, shuffle=False, repeat=False
    )
    batch = loader.read(0, len(loader))
    stream = batch["tokens"][batch["loss_weights"] == 1].tolist()
    found = tokenizer.decode(stream).split("<|endoftext|>")
    assert sorted(found) == sorted([*texts, ""])


def test_the_mixture_of_cached_tasks(cache_dir):
    loader = ExampleLoader("test_mixture", cache_dir=cache_dir, sequence_length=LENGTH)
    assert loader.rates == {"test_a": 0.7, "test_b": 0.3}
    assert loader.read(0, 20)["tokens"].shape == (20, LENGTH)


def test_loss_weights_of_a_task_are_kept(registry, cache_dir):
    loader = ExampleLoader("test_chat", cache_dir=cache_dir, sequence_length=LENGTH, repeat=False, shuffle=False)
    batch = loader.read(0, len(loader))
    # In each document loss is on every second token.
    position = 0
    for token, weight in zip(batch["tokens"].ravel(), batch["loss_weights"].ravel(), strict=True):
        if position == 0 and token == registry.vocabulary.eos_id:
            break  # filling
        assert weight == position % 2
        position = 0 if token == registry.vocabulary.eos_id else position + 1
    manifest = packing.Manifest.load(packing.packed_folder(cache_dir, "test_chat", LENGTH, "train"))
    assert 0.4 < manifest.loss_tokens / manifest.tokens < 0.5


def test_seqio_reads_the_cache(registry, cache_dir, monkeypatch):
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(cache_dir)])
    task = seqio.get_mixture_or_task("test_b").replace(name="test_b")
    dataset = task.get_dataset(sequence_length=None, split="train", use_cached=True, shuffle=False)
    found = [registry.vocabulary.decode(example["targets"]) for example in dataset.as_numpy_iterator()]
    assert sorted(found) == sorted(text + "<|endoftext|>" for text in _texts(registry, "test_b", "train"))
    assert task.get_cached_stats("train")["examples"] == len(found)


def test_bytes_do_not_depend_on_the_number_of_workers(registry, cache_dir, tmp_path):
    prepared = cache.prepare("test_a", cache_dir=tmp_path, sequence_length=LENGTH, num_shards=3, beam_options=THREADS)
    assert [one.folder.name for one in prepared] == ["train", "validation"]
    assert _files(tmp_path / "test_a" / "packed-32") == _files(cache_dir / "test_a" / "packed-32")


def test_bytes_do_not_depend_on_worker_processes(registry, vocabulary_file, tmp_path):
    """Nor is TensorFlow imported in them: these are the steps that rows can go through."""
    pattern = [str(path) for paths in registry.files.values() for path in paths]
    contents = []
    with gin.unlock_config():
        gin.clear_config()
        gin.bind_parameter("local_files.pattern", pattern)
        gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    try:
        for count in (1, 3):
            cache.prepare(
                "local_files", cache_dir=tmp_path / f"{count}", sequence_length=8, num_shards=4, num_workers=count
            )
            contents.append(_files(tmp_path / f"{count}"))
    finally:
        gin.clear_config()
    assert contents[0] == contents[1]


def test_complete_data_is_used_again(registry, cache_dir, monkeypatch, caplog):
    monkeypatch.setattr(workers, "_here", None)
    before = _files(cache_dir)
    with caplog.at_level(logging.INFO, "qwen_jax"):
        prepared = cache.prepare("test_a", cache_dir=cache_dir, sequence_length=LENGTH)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        "test_a: cached already",
        "test_a train, length 32: packed already",
        "test_a validation, length 32: packed already",
    ]
    assert prepared[0].manifest.documents > 0 and _files(cache_dir) == before


def test_two_processes_make_a_cache_once(registry, cache_dir, tmp_path, caplog):
    """The second waits, and then finds what the first has made."""
    made = []
    with caplog.at_level(logging.INFO, "qwen_jax"):
        with files.locked_in_turn(tmp_path, ".test_a.lock"):
            prepare = functools.partial(cache.prepare, "test_a", cache_dir=tmp_path, sequence_length=LENGTH)
            thread = threading.Thread(target=lambda: made.extend(prepare()))
            thread.start()
            while not any("waiting for another process" in record.getMessage() for record in caplog.records):
                assert thread.is_alive()
                thread.join(0.01)
            shutil.copytree(cache_dir / "test_a", tmp_path / "test_a")
        thread.join()
    assert [one.manifest for one in made] == [one.manifest for one in prepare()]
    assert not any(
        "tokenizing" in record.getMessage() or "packing," in record.getMessage() for record in caplog.records
    )
    assert _files(tmp_path / "test_a") == _files(cache_dir / "test_a") and not list(tmp_path.glob(".*"))


def test_packing_goes_on_after_the_last_finished_shard(registry, cache_dir, tmp_path, monkeypatch):
    shutil.copytree(cache_dir / "test_a", tmp_path / "test_a", ignore=shutil.ignore_patterns("packed-*"))
    write_shard, written = packing.write_shard, []

    def fail_at_third(path, *args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, *args, **kwargs)

    monkeypatch.setattr(packing, "write_shard", fail_at_third)
    prepare = functools.partial(
        cache.prepare, "test_a", cache_dir=tmp_path, sequence_length=LENGTH, splits=("train",), num_shards=3
    )
    with pytest.raises(BaseException, match="KeyboardInterrupt|^$"):
        prepare()
    folder = packing.packed_folder(tmp_path, "test_a", LENGTH, "train")
    assert not (folder / packing.MANIFEST).exists() and len(written) == 2
    with pytest.raises(FileNotFoundError):
        ExampleLoader("test_a", cache_dir=tmp_path, sequence_length=LENGTH)

    def record(path, *args, **kwargs):
        written.append(path.name)
        return write_shard(path, *args, **kwargs)

    monkeypatch.setattr(packing, "write_shard", record)
    prepare()
    assert len(written) == len(set(written)) == 3
    assert _files(folder) == _files(packing.packed_folder(cache_dir, "test_a", LENGTH, "train"))


def test_shards_of_another_number_from_an_interrupted_run_are_removed(registry, cache_dir, tmp_path):
    shutil.copytree(cache_dir / "test_a", tmp_path / "test_a")
    folder = packing.packed_folder(tmp_path, "test_a", LENGTH, "train")
    (folder / packing.MANIFEST).unlink()
    cache.prepare("test_a", cache_dir=tmp_path, sequence_length=LENGTH, splits=("train",), num_shards=2)
    assert sorted(path.name for path in folder.glob("*.array_record")) == [
        f"part-0000{number}-of-00002.array_record" for number in range(2)
    ]
    assert len(list(folder.iterdir())) == 5  # two shards with an index each, and the manifest


KILLED = """
import os, signal, sys
import gin
import tasks
from qwen_jax.data import cache, packing, tokenizer

stage, cache_dir, corpus, vocabulary = sys.argv[1:]
gin.bind_parameter("local_files.pattern", corpus)
gin.bind_parameter("vocabulary_path.path", vocabulary)

def kill_after(owner, name, calls):
    original, left = getattr(owner, name), [calls]
    def counted(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, counted)

if stage == "tokenizing":
    kill_after(tokenizer.Tokenizer, "encode_array", 20)
else:
    original = packing.write_shard
    def write_shard(path, *args, **kwargs):
        if len(list(path.parent.glob("*.array_record"))) == 2:
            kill_after(packing, "encode_record", 3)
        return original(path, *args, **kwargs)
    packing.write_shard = write_shard
cache.prepare("local_files", cache_dir=cache_dir, sequence_length=32, splits=("train",), num_shards=4,
              packing="best_fit")
"""


def test_a_process_killed_twice_gives_the_same_bytes(registry, vocabulary_file, tmp_path, root, plain_environment):
    """`kill -9` while it tokenizes, again in the middle of the third shard; the third process finishes."""
    corpus, broken, whole = str(registry.files["test_a"][0]), tmp_path / "broken", tmp_path / "whole"
    folder = packing.packed_folder(broken, "local_files", LENGTH, "train", "best_fit")
    for stage in ("tokenizing", "packing"):
        command = [python(), "-c", KILLED, stage, str(broken), corpus, str(vocabulary_file)]
        done = subprocess.run(command, cwd=root, env=plain_environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (broken / "local_files" / "description.json").exists() == (stage == "packing")
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert len(finished) == 2 and len(list(folder.glob(".*.tmp"))) == 1
    prepare = functools.partial(
        cache.prepare, "local_files", sequence_length=LENGTH, splits=("train",), num_shards=4, packing="best_fit"
    )
    with gin.unlock_config():
        gin.clear_config()  # of a test before, in this process
        gin.bind_parameter("local_files.pattern", corpus)
        gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    try:
        prepare(cache_dir=broken)
        prepare(cache_dir=whole)
    finally:
        gin.clear_config()
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert _files(broken) == _files(whole)


def test_fitted_examples_keep_documents_apart(registry, cache_dir, tmp_path):
    shutil.copytree(cache_dir / "test_a", tmp_path / "test_a")
    one, two = (tmp_path / "test_a" / name for name in ("packed-32-best_fit", "one-worker"))
    prepare = functools.partial(
        cache.prepare, "test_a", cache_dir=tmp_path, sequence_length=LENGTH, num_shards=3, packing="best_fit"
    )
    prepare()
    one.rename(two)
    prepare(beam_options=THREADS)
    assert _files(one) == _files(two)  # whatever the number of workers
    assert _files(tmp_path / "test_a" / "packed-32") == _files(cache_dir / "test_a" / "packed-32")
    tokenizer = registry.vocabulary.tokenizer
    loader = ExampleLoader("test_a", cache_dir=tmp_path, sequence_length=LENGTH, packing="best_fit", repeat=False)
    assert loader.columns == token_columns(loader.sequence_length, packed=True)
    batch = loader.read(0, len(loader))
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_weights": "float32",
    }
    found, expected = [], []
    for row in range(len(loader)):
        segments = batch["segment_ids"][row]
        found += [batch["tokens"][row][segments == s].tolist() for s in range(1, segments.max() + 1)]
    for text in _texts(registry, "test_a", "train"):
        ids = [*tokenizer.encode(text), tokenizer.endoftext_id]
        expected += [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    assert sorted(found) == sorted(expected)
    assert ((batch["segment_ids"] > 0) == (batch["loss_weights"] > 0)).all()


def test_another_packing_is_not_taken_for_the_one_asked_for(cache_dir):
    with pytest.raises(FileNotFoundError, match=r"packed by 'best_fit' to sequence length 32 .*--packing=best_fit"):
        ExampleLoader("test_b", cache_dir=cache_dir, sequence_length=LENGTH, packing="best_fit")
    with pytest.raises(ValueError, match="packing is 'fitted': it must be one of concat, best_fit"):
        ExampleLoader("test_b", cache_dir=cache_dir, sequence_length=LENGTH, packing="fitted")
    with pytest.raises(ValueError, match="packing is 'fitted': it must be one of concat, best_fit"):
        cache.prepare("test_b", cache_dir=cache_dir, sequence_length=LENGTH, packing="fitted")


def test_another_length_needs_no_new_tokenizing(registry, cache_dir, tmp_path, caplog):
    shutil.copytree(cache_dir / "test_a", tmp_path / "test_a")
    with caplog.at_level(logging.INFO, "qwen_jax"):
        prepared = cache.prepare("test_a", cache_dir=tmp_path, sequence_length=8, splits=("train",))
    assert "tokenizing" not in caplog.text
    assert prepared[0].manifest.sequence_length == 8 and len(prepared[0].manifest.shards) == 1


def test_data_made_from_something_else_is_refused(registry, cache_dir, tmp_path, add_task):
    prepare = functools.partial(cache.prepare, cache_dir=cache_dir, sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"packed with seed 0 \(now: 7\): delete that folder"):
        prepare("test_a", seed=7)
    with pytest.raises(ValueError, match=r"other shards than 5 .*delete that folder"):
        prepare("test_a", num_shards=5)
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n')
    add_task("changing", [path])
    prepare = functools.partial(
        cache.prepare, "changing", cache_dir=tmp_path / "cache", sequence_length=LENGTH, splits=("train",)
    )
    prepare()
    path.write_text('{"text": "a longer corpus"}\n')
    with pytest.raises(ValueError, match=r"changing was made with another corpus \(file_bytes 14; now: 28\)"):
        prepare()
    seqio.TaskRegistry.remove("changing")
    path.write_text('{"text": "a"}\n')
    other = tmp_path / "other.tiktoken"
    shutil.copy(registry.vocabulary.tokenizer.path, other)
    with other.open("ab") as file:
        file.write(b"enp6eg== 392\n")
    seqio.TaskRegistry.add(
        "changing",
        source=DocumentSource(functools.partial(Corpus, [path], validation_share=0.0)),
        preprocessors=registry.steps(seqio.preprocessors.append_eos),
        output_features={"targets": seqio.Feature(QwenVocabulary(other), dtype=registry.plain["targets"].dtype)},
    )
    with pytest.raises(ValueError, match=r"made with another vocabulary \(600 ids, .*; now: 601 ids"):
        prepare()
    path.unlink()


def test_a_cache_outlives_its_corpus(registry, tmp_path, add_task, caplog):
    """Where no corpus is named the cache is what is meant; one that is named must be there."""
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n')
    named = [path]

    def corpus() -> Corpus:
        if not named:
            raise ValueError("no corpus is named")
        return Corpus(named, validation_share=0.0)

    add_task("gone", DocumentSource(corpus))
    prepare = functools.partial(
        cache.prepare, "gone", cache_dir=tmp_path / "cache", sequence_length=LENGTH, splits=("train",)
    )
    prepare()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl"):
        prepare()
    named.clear()
    assert prepare()[0].manifest.documents == 1
    assert "gone: no corpus is named, so the cache is used unchecked" in caplog.text


def test_no_documents_leave_nothing(tmp_path, add_task):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n")
    add_task("empty", [path])
    with pytest.raises(ValueError, match="task empty yields no document in split 'train'"):
        cache.prepare("empty", cache_dir=tmp_path / "cache", sequence_length=LENGTH)
    assert not _files(tmp_path / "cache") and not (tmp_path / "cache" / "empty").exists()


def test_a_malformed_corpus_is_named_and_leaves_nothing(tmp_path, add_task):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    add_task("malformed", [path])
    for options in ((), THREADS):
        with pytest.raises(ValueError) as error:
            cache.prepare("malformed", cache_dir=tmp_path / "cache", sequence_length=LENGTH, beam_options=options)
        assert re.fullmatch(rf"{path}:2: not JSON: [^\n]*", str(error.value))
        assert not (tmp_path / "cache" / "malformed").exists()


class _Deadly(Corpus):
    """Kills the process that reads its last file while the file `deadly` lies beside it."""

    def examples(self, path):
        if path == self.files[-1] and path.with_name("deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().examples(path)


def test_a_killed_worker_costs_no_finished_shard(registry, tmp_path, add_task):
    paths = [tmp_path / f"{number}.txt" for number in range(4)]
    for path in paths:
        path.write_text(f"document {path.name}")
    (tmp_path / "deadly").touch()
    add_task("deadly", DocumentSource(functools.partial(_Deadly, paths, validation_share=0.0)))
    prepare = functools.partial(
        cache.prepare, "deadly", cache_dir=tmp_path / "cache", sequence_length=8, splits=("train",), num_workers=2
    )
    with pytest.raises(workers.LostWorkerError, match="the same command goes on from here"):
        prepare()
    folder = tmp_path / "cache" / "deadly"
    names = [path.stem.removeprefix(".train-") for path in folder.glob(".train-*.json")]
    finished = {path: path.stat().st_mtime_ns for path in (folder / f"train.tfrecord-{name}" for name in names)}
    assert len(finished) >= 2  # whoever reads the last file has given others away
    (tmp_path / "deadly").unlink()
    assert prepare()[0].manifest.documents == 4
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_run_killed_before_its_last_file_is_a_cache_for_seqio(cache_dir, registry, tmp_path):
    shutil.copytree(cache_dir / "test_b", tmp_path / "test_b")
    (tmp_path / "test_b" / cache.COMPLETED).unlink()
    cache.prepare("test_b", cache_dir=tmp_path, sequence_length=LENGTH)
    assert _files(tmp_path) == {name: data for name, data in _files(cache_dir).items() if name.startswith("test_b")}


def test_damaged_caches_are_named(registry, cache_dir, tmp_path):
    shutil.copytree(cache_dir / "test_b", tmp_path / "test_b", ignore=shutil.ignore_patterns("packed-*"))
    (file,) = (tmp_path / "test_b").glob("train.tfrecord-*")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{file} is damaged: delete {tmp_path / 'test_b'} and cache the task again"):
        cache.prepare("test_b", cache_dir=tmp_path, sequence_length=LENGTH)


def test_a_split_without_documents_keeps_the_other(registry, tmp_path, add_task, caplog):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "only"}\n')
    add_task("one_document", [path], share=0.1)
    prepare = functools.partial(cache.prepare, "one_document", cache_dir=tmp_path, sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"split 'validation': .*leave the split out \(--splits\)"):
        prepare(splits=("validation",))
    for _ in range(2):
        caplog.clear()
        (prepared,) = prepare()
        assert (prepared.manifest.split, prepared.manifest.documents) == ("train", 1)
        assert "one_document holds out no document" in caplog.text


def test_a_few_documents_hold_out_one_whatever_the_workers(registry, tmp_path, add_task):
    """A share of a thousandth of five documents is one document, and the same one however many workers there are."""
    paths = [tmp_path / f"{number}.txt" for number in range(5)]
    for path in paths:
        path.write_text(f"document {path.name}")
    add_task("five", paths, share=0.001)
    manifests = [
        [
            one.manifest
            for one in cache.prepare("five", cache_dir=tmp_path / name, sequence_length=8, beam_options=options)
        ]
        for name, options in (("one", ()), ("three", THREADS))
    ]
    assert [manifest.documents for manifest in manifests[0]] == [4, 1] and manifests[0] == manifests[1]


def test_a_cache_for_training_alone_is_used_without_its_corpus(registry, tmp_path, add_task, caplog):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n')
    named = [path]

    def corpus() -> Corpus:
        if not named:
            raise ValueError("no corpus is named")
        return Corpus(named)

    add_task("train_alone", DocumentSource(corpus))
    cache.prepare("train_alone", cache_dir=tmp_path / "cache", sequence_length=LENGTH, splits=("train",))
    named.clear()
    prepared = cache.prepare("train_alone", cache_dir=tmp_path / "cache", sequence_length=LENGTH)
    assert [one.manifest.split for one in prepared] == ["train"]
    assert "train_alone holds out no document" in caplog.text


def test_appended_words_are_refused_before_training(registry, tmp_path, add_task):
    ranks = dict(registry.vocabulary.tokenizer.mergeable_ranks)
    write_ranks(ranks | {b"zqx": len(ranks)}, tmp_path / "appended.tiktoken")
    add_task("appended", registry.files["test_a"], vocabulary=QwenVocabulary(tmp_path / "appended.tiktoken"))
    with pytest.raises(ValueError, match=r"appended\.tiktoken: 1 tokens cannot be written as merges, .*b'zqx' \(rank"):
        cache.prepare("appended", cache_dir=tmp_path / "cache", sequence_length=LENGTH)
    assert not (tmp_path / "cache").exists()


def test_misspelt_beam_options_are_refused_even_if_nothing_is_left_to_do(registry, cache_dir):
    prepare = functools.partial(cache.prepare, "test_a", cache_dir=cache_dir, sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"Beam has no option --runer\. Did you mean --runner\?"):
        prepare(beam_options=["--runer=FlinkRunner"])
    with pytest.raises(ValueError, match=r"Did you mean --flink_master\?"):
        prepare(beam_options=["--runner=FlinkRunner", "--flink-master=localhost:8081"])
    with pytest.raises(ValueError, match="Beam: argument --direct_num_workers: invalid int value: 'many'"):
        prepare(beam_options=["--direct_num_workers=many"])
    with pytest.raises(ValueError, match="Unexpected pipeline runner: FlinkRuner"):
        prepare(beam_options=["--runner=FlinkRuner"], packing="best_fit")


def test_a_split_that_a_task_lacks(registry, tmp_path, add_task, caplog):
    import tensorflow as tf

    def texts(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"text": ["", "one", "two"]})

    add_task("train_only", seqio.FunctionDataSource(texts, splits=["train"]))
    prepared = cache.prepare("train_only", cache_dir=tmp_path, sequence_length=LENGTH)
    assert [one.manifest.split for one in prepared] == ["train"]
    assert prepared[0].manifest.documents == 2  # the one without text is left out
    assert "train_only has no split validation: left out" in caplog.text
    with pytest.raises(ValueError, match="none of the splits test; it has train"):
        cache.prepare("train_only", cache_dir=tmp_path, sequence_length=LENGTH, splits=("test",))


def test_tasks_that_cannot_be_packed(registry, tmp_path, add_task):
    import tensorflow as tf

    path = registry.files["test_a"][0]
    add_task("no_placeholder", [path], preprocessors=registry.steps(None)[:2])
    add_task("no_targets", [path], output_features={"inputs": registry.plain["targets"]})
    add_task("other_vocabulary", [path], vocabulary=seqio.ByteVocabulary())

    def add_weights(dataset):
        return dataset.map(lambda example: example | {"loss_weights": tf.constant([1, 2])})

    add_task("bad_weights", [path], preprocessors=registry.steps(add_weights))
    for name, message in {
        "no_placeholder": r"no seqio\.CacheDatasetPlaceholder\(\) among its preprocessors",
        "no_targets": "has the features inputs: packing needs one called 'targets'",
        "other_vocabulary": "uses ByteVocabulary: packing needs a QwenVocabulary",
        "bad_weights": r"'loss_weights' must have one 0 or 1 for each of the \d+ tokens",
        "misspelt": "'misspelt' is neither a task nor a mixture; there are .*test_a",
    }.items():
        with pytest.raises(Exception, match=message):
            cache.prepare(name, cache_dir=tmp_path, sequence_length=LENGTH, splits=("train",))


def test_a_worker_elsewhere_gets_the_configuration(registry, vocabulary_file):
    """Also where the path was computed by a function that the worker does not know, as in the files of gin/hardware."""
    config = "vocabulary_path.path = %PATH\nPATH = @unknown_here()\npython_corpus.max_bytes = 1234"
    pinned = PinnedTokenizer(str(vocabulary_file), Tokenizer(vocabulary_file).fingerprint)
    setup = WorkerSetup(("tasks",), config, str(vocabulary_file), "python_corpus", pinned)
    gin.clear_config()
    try:
        setup()
        assert gin.config_str() == ""  # the launcher itself keeps what it has
        elsewhere = dataclasses.replace(setup, launcher="elsewhere")
        elsewhere()
        vocabulary = seqio.TaskRegistry.get("python_corpus").output_features["targets"].vocabulary
        assert vocabulary.vocab_size == 600
        assert gin.query_parameter("python_corpus.max_bytes") == 1234
        with pytest.raises(RuntimeError, match="put the same file on every worker"):
            dataclasses.replace(elsewhere, tokenizer=dataclasses.replace(pinned, fingerprint="f00d"))()
    finally:
        gin.clear_config()
        logging.getLogger("absl").setLevel(logging.NOTSET)


def test_manifest_says_what_it_was_made_from(registry, cache_dir):
    description = json.loads((cache_dir / "test_a" / "description.json").read_text())
    manifest = packing.Manifest.load(packing.packed_folder(cache_dir, "test_a", LENGTH, "train"))
    assert description["splits"] == ["train", "validation"]
    assert description["source"] == manifest.source and manifest.source["files"] == 1
    assert np.sum([shard.documents for shard in manifest.shards]) == manifest.documents
