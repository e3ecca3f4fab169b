"""The reference's log-probabilities as a column: computed once, resumed, and never mistaken for those of another."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import files
from qwen_jax.alignment.dpo import REFERENCE_COLUMN, response_log_probs
from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.conversion.load import read_model_config
from qwen_jax.data import derived
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.distributed.hosts import JobConfig, connect
from qwen_jax.models.lora import LoraConfig
from qwen_jax.reference_column import ReferenceModel, with_reference
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.alignment.hand_made_pairs import pack_pairs
from tests.fakes import random_run
from tests.jobs import outputs_of_job, start_job
from tests.object_stores import s3, stores  # noqa: F401

LENGTH = 64
SIZES = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=64, dtype="float32", remat="none")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run folder with random weights over bytes."""
    return random_run(tmp_path_factory.mktemp("reference"), spread=0.1, **SIZES)


def random_bytes(random, count):
    return random.integers(0, 256, count).tolist()


@pytest.fixture
def cache(tmp_path, reference):
    """23 training pairs, one to a row, and 5 held-out ones."""
    random, tokenizer = np.random.default_rng(0), load_tokenizer(reference)
    for split, count in (("train", 23), ("validation", 5)):
        pairs = [[random_bytes(random, n) for n in random.integers(5, 12, 3)] for _ in range(count)]
        pack_pairs(tmp_path / "cache", "pairs", split, pairs, LENGTH, tokenizer)
    return tmp_path / "cache"


def loaders(cache):
    where = dict(cache_dir=cache, sequence_length=LENGTH, packing="whole")
    return ExampleLoader("pairs", seed=3, **where), ExampleLoader(
        "pairs", split="validation", shuffle=False, repeat=False, **where
    )


def add(reference, cache, axes=None, **changes):
    mesh = make_mesh(MeshConfig(**axes)) if axes else make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(read_model_config(reference), **changes)
    return with_reference(ReferenceModel(reference), loaders(cache), config, mesh, batch_size=8)


@pytest.fixture
def computed(monkeypatch):
    """The (first records of the) files that are computed, as they are written."""
    written = []
    write = derived.DerivedColumn.write

    def recording(self, start, values):
        written.append((self.folder.parent.name, start))
        write(self, start, values)

    monkeypatch.setattr(derived.DerivedColumn, "write", recording)
    monkeypatch.setattr(derived, "ROWS_PER_FILE", 8)
    return written


def test_each_row_has_the_log_probabilities_of_the_reference_whatever_order_it_is_read_in(reference, cache, computed):
    train_set, eval_set = add(reference, cache)
    model, params = load_pretrained(reference)
    assert train_set.columns[-1].name == REFERENCE_COLUMN and train_set.repeat and len(train_set) == 16
    for examples, start, stop in ((train_set, 3, 30), (eval_set, 0, len(eval_set))):
        batch = examples.read(start, stop)
        expected = np.asarray(response_log_probs(model, params, batch))
        np.testing.assert_allclose(batch[REFERENCE_COLUMN], expected, atol=1e-5)
        assert np.count_nonzero(expected) == batch["loss_weights"].sum()
    assert sorted(computed) == [("train", 0), ("train", 8), ("validation", 0)]
    # A second start computes nothing; the order may be another, as long as the data are not.
    again, _ = add(reference, cache)
    assert len(computed) == 3 and again.fingerprint == train_set.fingerprint


def test_eight_devices_write_the_same_column(reference, cache, computed):
    train_set, _ = add(reference, cache, dict(data=2, fsdp=2, sequence=2))
    model, params = load_pretrained(reference)
    batch = train_set.read(0, 12)
    np.testing.assert_allclose(batch[REFERENCE_COLUMN], response_log_probs(model, params, batch), atol=1e-5)


def main(address, index, reference, cache):
    """One of two processes with two devices each."""
    connect(JobConfig(coordinator_address=address, num_processes=2, process_id=int(index)))
    add(Path(reference), Path(cache), dict(data=2, fsdp=2))


@pytest.mark.slow
def test_two_processes_write_the_same_column(reference, cache, plain_environment):
    """Process 0 writes, and both read what it wrote."""
    program = "import sys; from tests.alignment.test_reference_column import main; main(*sys.argv[1:])"
    outputs_of_job(start_job(program, plain_environment, [[reference, cache]] * 2, devices=2))
    model, params = load_pretrained(reference)
    train_set, _ = add(reference, cache)
    batch = train_set.read(0, 23)
    np.testing.assert_allclose(batch[REFERENCE_COLUMN], response_log_probs(model, params, batch), atol=1e-5)


def test_an_interrupted_computation_goes_on(reference, cache, computed, monkeypatch):
    recording = derived.DerivedColumn.write

    def killed(self, start, values):
        if start == 8:
            raise KeyboardInterrupt
        recording(self, start, values)

    monkeypatch.setattr(derived.DerivedColumn, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        add(reference, cache)
    assert computed == [("train", 0)]
    (column,) = (cache / "pairs" / f"packed-{LENGTH}-whole" / "train").glob(f"{REFERENCE_COLUMN}-*")
    assert sorted(path.name for path in column.iterdir()) == ["rows-00000000.npy"]
    monkeypatch.setattr(derived.DerivedColumn, "write", recording)
    add(reference, cache)
    assert sorted(computed) == [("train", 0), ("train", 8), ("validation", 0)]


def test_another_reference_another_dtype_or_other_data_have_a_column_of_their_own(
    reference, cache, computed, tmp_path_factory
):
    first, _ = add(reference, cache)
    other = random_run(tmp_path_factory.mktemp("other"), spread=0.2, **SIZES)
    second, _ = add(other, cache)
    third, _ = add(reference, cache, dtype="bfloat16")
    assert len({one.fingerprint for one in (first, second, third)}) == 3 and len(computed) == 9
    read = [one.read(0, 12)[REFERENCE_COLUMN] for one in (first, second, third)]
    assert np.abs(read[0] - read[1]).max() > 0.1 > np.abs(read[0] - read[2]).max() > 0
    random, tokenizer = np.random.default_rng(1), load_tokenizer(reference)
    pairs = [[random_bytes(random, 5) for _ in range(3)] for _ in range(23)]
    pack_pairs(cache, "pairs", "train", pairs, LENGTH, tokenizer)
    fourth, _ = add(reference, cache)
    model, params = load_pretrained(reference)
    batch = fourth.read(0, 4)
    np.testing.assert_allclose(batch[REFERENCE_COLUMN], response_log_probs(model, params, batch), atol=1e-5)


def test_a_copy_of_the_reference_is_the_same_reference(reference, cache, computed, tmp_path):
    add(reference, cache)
    shutil.copytree(reference, tmp_path / "moved")
    add(tmp_path / "moved", cache)
    assert len(computed) == 3


def test_adapters_of_a_reference_are_merged(cache, computed, tmp_path_factory):
    adapted = random_run(tmp_path_factory.mktemp("adapted"), spread=0.1, lora=LoraConfig(rank=2, alpha=4.0), **SIZES)
    train_set, _ = add(adapted, cache)
    model, params = load_pretrained(adapted)
    batch = train_set.read(0, 4)
    np.testing.assert_allclose(batch[REFERENCE_COLUMN], response_log_probs(model, params, batch), atol=1e-5)


def test_references_that_do_not_fit_are_named(reference, cache, tmp_path, tmp_path_factory):
    config = load_pretrained(reference)[0].config
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match="464 vocabulary rows and the trained model 600"):
        with_reference(
            ReferenceModel(reference), loaders(cache), dataclasses.replace(config, vocab_size=600), mesh, batch_size=8
        )
    reward = random_run(tmp_path_factory.mktemp("reward"), head="scalar", **SIZES)
    with pytest.raises(ValueError, match="is a reward model: DPO needs a language model"):
        with_reference(ReferenceModel(reward), loaders(cache), config, mesh, batch_size=8)
    ranks = (reference / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    shutil.copytree(reference, tmp_path / "swapped")
    swapped = [ranks[1].split()[0] + b" 0\n", ranks[0].split()[0] + b" 1\n", *ranks[2:]]
    (tmp_path / "swapped" / "tokenizer.tiktoken").write_bytes(b"".join(swapped))
    with pytest.raises(ValueError, match="trained with another vocabulary"):
        with_reference(ReferenceModel(tmp_path / "swapped"), loaders(cache), config, mesh, batch_size=8)
    with pytest.raises(ValueError, match="REFERENCE_CHECKPOINT: expected a path"):
        ReferenceModel(None)


def test_a_damaged_reference_and_a_damaged_column_are_named(reference, cache, computed, monkeypatch, tmp_path_factory):
    broken = random_run(tmp_path_factory.mktemp("broken"), spread=float("nan"), **SIZES)
    with pytest.raises(ValueError, match="record 0 of .*train has values that are not finite"):
        add(broken, cache)
    train_set, _ = add(reference, cache)
    (column,) = (cache / "pairs" / f"packed-{LENGTH}-whole" / "train").glob(f"{REFERENCE_COLUMN}-*")
    (column / "rows-00000000.npy").write_bytes(b"half")
    with pytest.raises(OSError, match="rows-00000000.npy.*to compute it again"):
        train_set.read(0, 12)


def test_in_a_bucket_the_column_is_that_of_a_disk(reference, cache, computed, s3):  # noqa: F811
    """Data and reference: the latter is INITIAL_CHECKPOINT unless another is named."""
    url = files.as_path(s3.folder())
    convert("orbax", reference, "orbax", url / "reference", progress=False)
    for path in cache.rglob("*"):
        if path.is_file():
            files.copy_file(path, url / "cache" / path.relative_to(cache).as_posix())
    remote, local = add(url / "reference", url / "cache"), add(reference, cache)
    assert len(computed) == 6
    for there, here, stop in zip(remote, local, (30, len(local[1])), strict=True):
        found, expected = there.read(0, stop), here.read(0, stop)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=name)
    add(url / "reference", url / "cache")
    assert len(computed) == 6
    (column,) = (url / "cache" / "pairs" / f"packed-{LENGTH}-whole" / "train").glob(
        f"{REFERENCE_COLUMN}-*/manifest.json"
    )
    for content, message in ((b"half", "rows-00000000.npy"), (b"x" * 400, "rows-00000000.npy.*to compute it again")):
        (column.parent / "rows-00000000.npy").write_bytes(content)
        with pytest.raises(OSError, match=message):
            add(url / "reference", url / "cache")[0].read(0, 12)
