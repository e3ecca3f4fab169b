"""Reading by global index: order, epochs, rates, and what a user sees when the data is not there or damaged."""

import concurrent.futures
import json
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import packing
from qwen_jax.data.loader import ExampleLoader, split_by_weight
from tests.warm_python import python

LENGTH = 16
EOS = 599


def _write(
    folder, task: str, documents: int, seed: int, vocabulary: str = "f00d", split: str = "train", method: str = "concat"
) -> None:
    """Packed examples without SeqIO: a manifest and two shards."""
    target = packing.packed_folder(folder, task, LENGTH, split, method)
    target.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    columns, shards = packing.columns_for(600, LENGTH, method), []
    for index in range(2):
        rows = [packing.Document(generator.integers(0, 590, generator.integers(1, 40))) for _ in range(documents)]
        keyed = [(packing.document_key(row, 0), row) for row in rows]
        shards.append(
            packing.write_shard(
                target / f"part-{index}",
                keyed,
                sequence_length=LENGTH,
                eos_id=EOS,
                columns=columns,
                token_bytes=np.full(600, 3),
                method=method,
            )
        )
    packing.Manifest(task, split, LENGTH, 600, vocabulary, 0, columns, tuple(shards), {}).save(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    _write(path, "one", 30, 1)
    _write(path, "two", 20, 2)
    _write(path, "two", 5, 3, split="validation")
    _write(path, "group:three", 4, 4)
    _write(path, "one", 30, 1, method="best_fit")
    return path


def _loader(folder, name="one", **options) -> ExampleLoader:
    return ExampleLoader(name, cache_dir=folder, sequence_length=LENGTH, **options)


def _rows(loader: ExampleLoader, start: int, stop: int) -> list[bytes]:
    return [row.tobytes() for row in loader.read(start, stop)["tokens"]]


def test_shapes_types_and_figures(folder):
    loader = _loader(folder)
    batch = loader.read(3, 10)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((7, LENGTH), "int32"),
        "loss_weights": ((7, LENGTH), "float32"),
    }
    assert loader.vocab_size == 600 and loader.vocabulary_fingerprint == "f00d"
    assert loader.rates == {"one": 1.0}
    manifest = packing.Manifest.load(packing.packed_folder(folder, "one", LENGTH, "train"))
    assert len(loader) == manifest.records
    assert loader.bytes_per_token == manifest.text_bytes / manifest.tokens
    assert loader.read(5, 5)["tokens"].shape == (0, LENGTH)


def test_nothing_is_lost_on_the_way(folder):
    """All tokens with loss are those of the manifest, and filling carries none."""
    loader = _loader(folder, repeat=False)
    batch = loader.read(0, len(loader))
    manifest = packing.Manifest.load(packing.packed_folder(folder, "one", LENGTH, "train"))
    assert batch["loss_weights"].sum() == manifest.tokens
    assert (batch["tokens"][batch["loss_weights"] == 0] == EOS).all()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=6), seed=st.integers(0, 3), shuffle=st.booleans())
def test_order_does_not_depend_on_how_it_is_cut(folder, cuts, seed, shuffle):
    loader = _loader(folder, seed=seed, shuffle=shuffle)
    edges = [0, *sorted(cuts), 150]
    pieces = [row for start, stop in zip(edges, edges[1:], strict=False) for row in _rows(loader, start, stop)]
    assert pieces == _rows(_loader(folder, seed=seed, shuffle=shuffle), 0, 150)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_epoch_is_another_permutation(folder, seed):
    loader = _loader(folder, seed=seed)
    size = len(loader)
    epochs = [_rows(loader, epoch * size, (epoch + 1) * size) for epoch in range(3)]
    once = _rows(_loader(folder, shuffle=False, repeat=False), 0, size)
    assert all(sorted(epoch) == sorted(once) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != once


HOST = """
import json, pathlib, sys
import numpy as np
from qwen_jax.data import loader

folder, state, output, rows, batches = pathlib.Path(sys.argv[1]), *map(pathlib.Path, sys.argv[2:4]), *sys.argv[4:]
first, stop, step, batch_size = map(int, rows.split(","))
examples = loader.ExampleLoader("one", cache_dir=folder, sequence_length=16, seed=5, packing="best_fit")

read, records = [], loader._Records.read
def count(self, numbers):
    read.extend(numbers)
    return records(self, numbers)
loader._Records.read = count

start = json.loads(state.read_text())["next"] if state.exists() else 0
parts = []
for batch in range(int(batches)):
    base = start + batch * batch_size
    parts += [examples.read(i, i + 1) for i in range(base + first, base + stop, step)] if step > 1 else [
        examples.read(base + first, base + stop)]
columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
np.savez(output, read=len(read), **columns)
print(start + int(batches) * batch_size)
"""


def _run_hosts(folder, state, hosts: int, batches: int, batch_size: int, by: str, environment, root) -> dict:
    """Global batches as `hosts` processes read them, each its own rows: blocks of neighbours, or every so many."""
    per_host, processes = batch_size // hosts, []
    for host in range(hosts):
        rows = (host * per_host, (host + 1) * per_host, 1) if by == "blocks" else (host, batch_size, hosts)
        output = state.with_name(f"host{host}.npz")
        arguments = [folder, state, output, ",".join(map(str, (*rows, batch_size))), batches]
        command = [python(), "-c", HOST, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append((range(*rows), output, subprocess.Popen(command, cwd=root, env=environment, **pipes)))
    merged: dict[str, np.ndarray] = {}
    ends = set()
    for rows, output, process in processes:
        shown, errors = process.communicate()
        assert process.returncode == 0, errors
        ends.add(int(shown))
        with np.load(output) as part:
            assert part["read"] == batches * per_host  # and no record of another host
            for name in set(part.files) - {"read"}:
                shape = (batches, batch_size, LENGTH)
                whole = merged.setdefault(name, np.full(shape, -1, part[name].dtype))
                whole[:, list(rows)] = part[name].reshape(batches, per_host, LENGTH)
    state.write_text(json.dumps({"next": ends.pop()}))
    assert not ends
    return {name: array.reshape(-1, LENGTH) for name, array in merged.items()}


def test_processes_see_the_batches_of_one(folder, tmp_path, root, plain_environment):
    """One process, resumed as two, resumed as four, over two ends of an epoch and with other splits of the batch."""
    loader = _loader(folder, seed=5, packing="best_fit")
    state, batch_size, parts = tmp_path / "state.json", 8, []
    phases = [(1, len(loader) // batch_size - 1, "blocks"), (2, len(loader) // batch_size, "turns"), (4, 9, "blocks")]
    for hosts, batches, by in phases:
        parts.append(_run_hosts(folder, state, hosts, batches, batch_size, by, plain_environment, root))
    total = sum(batches for _, batches, _ in phases) * batch_size
    assert total > 2 * len(loader) and json.loads(state.read_text()) == {"next": total}
    whole = loader.read(0, total)
    assert set(whole) == set(parts[0]) == {"tokens", "loss_weights", "segment_ids", "positions"}
    for name, array in whole.items():
        together = np.concatenate([part[name] for part in parts])
        assert together.dtype == array.dtype and together.tobytes() == array.tobytes(), name


def test_seeds_give_other_orders(folder):
    assert _rows(_loader(folder, seed=0), 0, 40) != _rows(_loader(folder, seed=1), 0, 40)


def test_fingerprint_tells_data_and_order_apart(folder):
    prints = [
        _loader(folder).fingerprint,
        _loader(folder, seed=1).fingerprint,
        _loader(folder, shuffle=False).fingerprint,
        _loader(folder, packing="best_fit").fingerprint,
        _loader(folder, "two").fingerprint,
        _loader(folder, "two", split="validation").fingerprint,
    ]
    assert len(set(prints)) == len(prints) and _loader(folder).fingerprint == prints[0]


def test_end_of_a_loader_that_does_not_repeat(folder):
    loader = _loader(folder, repeat=False)
    with pytest.raises(IndexError, match=rf"within the {len(loader)} examples of one train, got start=0, stop="):
        loader.read(0, len(loader) + 1)
    with pytest.raises(IndexError, match="expected 0 <= start <= stop"):
        _loader(folder).read(5, 4)
    with pytest.raises(ValueError, match="seed is -1"):
        _loader(folder, seed=-1)


def test_threads_read_the_same(folder):
    loader = _loader(folder)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: _rows(loader, 7 * i, 7 * i + 7), range(40)))
    assert [row for part in parts for row in part] == _rows(_loader(folder), 0, 280)


@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), start=st.integers(0, 10**9), parts=st.integers(1, 4)
)
def test_every_window_holds_exactly_the_weights(weights, start, parts):
    total = sum(weights)
    source, within = split_by_weight(np.arange(start, start + parts * total, dtype=np.int64), weights)
    assert np.bincount(source, minlength=len(weights)).tolist() == [weight * parts for weight in weights]
    for number in range(len(weights)):
        positions = within[source == number]
        assert positions.tolist() == list(range(positions[0], positions[0] + len(positions)))


@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=5), stop=st.integers(1, 500))
def test_shares_are_spread_evenly(weights, stop):
    source, _ = split_by_weight(np.arange(stop, dtype=np.int64), weights)
    counts = np.bincount(source, minlength=len(weights))
    assert np.abs(counts - stop * np.array(weights) / sum(weights)).max() < len(weights)


@pytest.fixture
def mixture():
    """Registers mixtures by name and rates; the tasks of the packed data need no pipeline."""
    import seqio

    names, tasks = [], []
    for task in ("one", "two", "absent"):
        source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
        seqio.TaskRegistry.add(task, source=source, preprocessors=[], output_features={})
        tasks.append(task)

    def add(name, rates):
        seqio.MixtureRegistry.add(name, rates)
        names.append(name)

    yield add
    for name in names:
        seqio.MixtureRegistry.remove(name)
    for task in tasks:
        seqio.TaskRegistry.remove(task)


@pytest.mark.parametrize(
    ("rates", "window", "expected"),
    [((0.7, 0.3), 10, (7, 3)), ((1, 2), 3, (1, 2)), ((1 / 3, 2 / 3), 3, (1, 2)), ((0.123, 0.877), 1000, (123, 877))],
)
def test_mixing_rates_are_exact(folder, mixture, rates, window, expected):
    mixture("mixed", [("one", rates[0]), ("two", rates[1])])
    loader = _loader(folder, "mixed")
    one = set(_rows(_loader(folder, repeat=False), 0, len(_loader(folder))))
    for start in (0, 17):
        rows = _rows(loader, start, start + window)
        assert (sum(row in one for row in rows), sum(row not in one for row in rows)) == expected


def test_mixture_figures(folder, mixture):
    mixture("mixed", [("one", 3), ("two", 1)])
    loader, one, two = (_loader(folder, name) for name in ("mixed", "one", "two"))
    assert loader.rates == {"one": 0.75, "two": 0.25}
    assert len(loader) == len(one) + len(two)
    assert loader.bytes_per_token == pytest.approx(0.75 * one.bytes_per_token + 0.25 * two.bytes_per_token)
    assert loader.fingerprint != one.fingerprint
    # The order of one task within the mixture is its order alone.
    of_one = set(_rows(one, 0, len(one)))
    assert [row for row in _rows(loader, 0, 60) if row in of_one] == _rows(one, 0, 45)


def test_evaluation_goes_through_everything_once(folder, mixture):
    mixture("mixed", [("one", 100), ("two", 1)])
    loader = _loader(folder, "mixed", repeat=False, shuffle=False)
    rows = _rows(loader, 0, len(loader))
    parts = [_rows(_loader(folder, name, repeat=False), 0, len(_loader(folder, name))) for name in ("one", "two")]
    assert sorted(rows) == sorted(parts[0] + parts[1])


def test_what_is_not_cached_names_the_command(folder, mixture, tmp_path):
    command = r"python tools/cache_task\.py {} --cache_dir=\S+ --sequence_length={}"
    mixture("mixed", [("one", 1), ("absent", 1)])
    for name, length in (("one", 99), ("mixed", LENGTH)):
        with pytest.raises(FileNotFoundError, match=command.format(name, length)):
            ExampleLoader(name, cache_dir=folder, sequence_length=length)
    with pytest.raises(FileNotFoundError, match=r"there are lengths 16.*" + command.format("one", 99)):
        ExampleLoader("one", cache_dir=folder, sequence_length=99)
    with pytest.raises(ValueError, match="'onne' is neither a task nor a mixture; there are .*one"):
        _loader(tmp_path, "onne")


def test_an_unfinished_split_is_not_read(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "one")
    (tmp_path / "one" / "packed-16" / "train" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tools/cache_task\.py one"):
        _loader(tmp_path)


def test_a_mixture_has_one_vocabulary(folder, mixture, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "one")
    _write(tmp_path, "two", 5, 2, vocabulary="beef")
    mixture("mixed", [("one", 1), ("two", 1)])
    with pytest.raises(ValueError, match="must share one vocabulary, found two with beef; one with f00d"):
        _loader(tmp_path, "mixed")


def test_a_rate_too_small_to_keep(folder, mixture):
    mixture("mixed", [("one", 1), ("two", 1e-9)])
    with pytest.raises(ValueError, match="the rate of two is 1e-09: each must be 0 or at least"):
        _loader(folder, "mixed")


def _damage_size(path):
    path.write_bytes(path.read_bytes()[:-100])


def _damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[300:900] = b"\xaa" * 600
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_damage_size, _damage_bytes, lambda path: path.unlink()])
def test_damaged_shards_are_named(folder, tmp_path, damage):
    shutil.copytree(folder / "one", tmp_path / "one")
    path = tmp_path / "one" / "packed-16" / "train" / "part-1"
    damage(path)
    loader = _loader(tmp_path)
    with pytest.raises(OSError, match=r"cannot read packed examples from .*part-1.*cache the task again"):
        loader.read(0, len(loader))


def test_task_names_with_a_colon_are_folders(folder):
    assert len(_loader(folder, "group:three")) > 0
