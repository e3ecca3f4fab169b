"""Of a checkpoint that several processes wrote, each reads the chunks of its own shards."""

import itertools

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import files
from qwen_jax.checkpoints.chunks import needed_files, overlapping_chunks
from tests.jobs import outputs_of_job, start_job
from tests.object_stores import FaultProxy, environment, stores  # noqa: F401


def spans(size):
    """Slices of neighboring elements, perhaps of none."""
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: slice(*ends))


@given(st.data())
def test_the_chunks_of_a_region_are_those_that_hold_one_of_its_elements(data):
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3))
    chunk_shape = [data.draw(st.integers(1, size)) for size in shape]
    regions = data.draw(st.lists(st.tuples(*map(spans, shape)), max_size=3))
    expected = {
        tuple(place // size for place, size in zip(element, chunk_shape, strict=True))
        for region in regions
        for element in itertools.product(*(range(size)[one] for one, size in zip(region, shape, strict=True)))
    }
    assert overlapping_chunks(shape, chunk_shape, regions) == expected


class Half:
    """A sharding whose second half is on devices of another process."""

    def addressable_devices_indices_map(self, shape):
        return {0: (slice(0, shape[0] // 2), *(slice(None) for _ in shape[1:]))} if shape else {0: ()}


def test_the_names_are_those_of_orbax(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))

    def place(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def read(name):
        return (tmp_path / "1" / name).read_text()

    layer = {"w": place(np.arange(48.0).reshape(8, 6), "rows"), "v": place(np.ones((4, 4)), "rows", "columns")}
    trees = {"params": {"layer": layer, "list": [place(np.ones(4)), place(np.int32(3))]}}
    trees |= {"other": {"w": place(np.ones(4), "rows")}}
    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_replica_parallel = False
    with context:
        ocp.save_checkpointables(str(tmp_path / "1"), trees)
    names = sorted(path.relative_to(tmp_path / "1").as_posix() for path in tmp_path.rglob("*") if path.is_file())
    whole = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding), trees)
    assert needed_files(names, read, whole) == names
    half = jax.tree.map(lambda one: type("Leaf", (), {"shape": one.shape, "sharding": Half()})(), trees)
    del half["other"]  # not known where it goes
    left_out = {*names} - {*needed_files(names, read, half)}
    assert left_out == {
        *(f"params/layer.w/c/{row}/0" for row in (2, 3)),
        *(f"params/layer.v/c/{row}/{column}" for row in (2, 3) for column in (0, 1)),
    }


SAVED_AND_RESTORED = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwen_jax import files
from qwen_jax.checkpoints.bucket import BucketCheckpoints
sharding = NamedSharding(Mesh(np.array(jax.devices()), "a"), PartitionSpec("a"))
values = {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "v": np.ones(2, np.float32)}
make = lambda value: jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
trees = {"params": {name: make(value) for name, value in values.items()}}
checkpoints = BucketCheckpoints(files.as_path(sys.argv[3]))
checkpoints.save(1, trees, {"positions": {}})
checkpoints.wait()
abstract = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding), trees)
step, found, _ = checkpoints.restore_latest(abstract)
for name, value in values.items():
    for shard in found["params"][name].addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_read_each_chunk_once(stores, plain_environment):  # noqa: F811
    url = files.as_path(stores["gs"].folder("run"))
    with FaultProxy(stores["gs"]) as proxy, environment(stores["gs"].through(proxy)):
        variables = plain_environment | stores["gs"].through(proxy)
        outputs_of_job(start_job(SAVED_AND_RESTORED, variables, [[url]] * 2))
    for chunk in ("w/c/0/0", "w/c/1/0", "v/c/0", "v/c/1"):
        assert sum(one.endswith(f"/checkpoints/1/params/{chunk}") and one[:4] == "GET " for one in proxy.seen) == 1
