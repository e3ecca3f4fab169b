"""Batches on devices: the rows a device holds, wherever they lie, each read once; positions past skipped spans."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qwen_jax.batch_spec import token_columns
from qwen_jax.sharding import MESH_AXES
from qwen_jax.training.batches import Prefetcher, global_batch
from qwen_jax.training.step import batch_shapes
from tests.fakes import FakeExamples


def shapes_on(order, layout):
    devices = np.array(jax.devices())[order].reshape([layout.get(axis, 1) for axis in MESH_AXES])
    return batch_shapes(Mesh(devices, MESH_AXES), 16, token_columns(16))


@pytest.mark.parametrize("layout", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("order", [range(8), [0, 4, 1, 5, 2, 6, 3, 7], [7, 2, 5, 0, 3, 6, 1, 4]])
def test_the_rows_of_a_device_are_its_own_however_devices_are_numbered(order, layout):
    """Neighboring devices of one host may hold rows far apart, as on a torus; only those are read, and once."""
    examples, shapes = FakeExamples(), shapes_on(list(order), layout)
    batch = global_batch(examples, 32, shapes)
    reads = list(examples.reads)
    expected = FakeExamples().read(32, 48)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, expected[name])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[name][shard.index])
    ways = layout["data"] * layout["fsdp"]
    assert sorted(reads) == [(32 + 16 // ways * part, 32 + 16 // ways * (part + 1)) for part in range(ways)]


def test_read_ahead_keeps_the_position_of_what_was_given(tmp_path):
    examples = FakeExamples()
    prefetcher = Prefetcher(examples, shapes_on(list(range(8)), {"data": 8}), skipped=[(32, 40), (40, 50)])
    assert prefetcher.positions == {"train": 0} and not examples.reads
    prefetcher.start({"train": 16, "prompts": 5})
    given = []
    for _ in range(3):
        before = prefetcher.positions["train"]
        given.append(np.asarray(prefetcher.next()["tokens"]))
        given.append((before, prefetcher.positions["train"]))
    prefetcher.close()
    assert given[1::2] == [(16, 32), (32, 66), (66, 82)]
    for tokens, start in zip(given[::2], (16, 50, 66), strict=True):
        np.testing.assert_array_equal(tokens, FakeExamples().read(start, start + 16)["tokens"])
