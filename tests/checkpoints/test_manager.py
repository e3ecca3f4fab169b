"""Checkpoints of any named trees, one position for each data stream; the format of before is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.checkpoints import manager
from qwen_jax.checkpoints.arrays import StoredParams, restore_params
from qwen_jax.checkpoints.manager import Checkpoints, OldFormatError
from qwen_jax.checkpoints.rewind import rewind
from qwen_jax.checkpoints.run_folder import CheckpointError, write_run_files
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import small_model

METADATA = {"positions": {"prompts": 40, "train": 64}, "fingerprints": {"prompts": "a", "train": "b"}}


def trees(scale=1.0):
    """What a run with two models, frozen parameters and running statistics would save."""
    return {
        "params": {
            "policy": {"kernel": scale * jnp.arange(16.0).reshape(8, 2)},
            "value": {"bias": scale * jnp.ones(3)},
        },
        "frozen": {"reference": {"kernel": (scale * jnp.arange(16.0)).astype(jnp.bfloat16)}},
        "optimizer": ({"policy": jnp.zeros((8, 2))}, jnp.int32(7)),
        "extra": {"reward": {"mean": jnp.float32(0.5), "count": jnp.int32(12)}},
    }


def placed(mesh, like):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=split if leaf.shape[:1] == (8,) else sharding
        ),
        like,
    )


@pytest.fixture
def saved(tmp_path):
    write_run_files(tmp_path, small_model(), None)
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 8):
        checkpoints.save(step, trees(step), METADATA)
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("devices", [1, 8])
def test_named_trees_and_positions_come_back_on_any_mesh(saved, devices):
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    step, found, metadata = Checkpoints(saved).restore_latest(placed(mesh, trees()))
    assert step == 8 and metadata == METADATA
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(trees(8)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    assert found["params"]["policy"]["kernel"].addressable_shards[0].data.shape == (8 // devices, 2)


def test_a_policy_of_which_a_part_was_frozen_is_read_whole(tmp_path):
    policy = {"layers": {"kernel": jnp.arange(16.0).reshape(8, 2)}, "bias": jnp.arange(3.0)}
    saved = trees() | {
        "params": {"policy": {"layers": policy["layers"]}, "value": {"bias": jnp.ones(3)}},
        "frozen": {"policy": {"bias": policy["bias"]}, "reference": policy},
    }
    write_run_files(tmp_path, small_model(), None)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, saved, METADATA)
    checkpoints.close()
    abstract = placed(make_mesh(MeshConfig(), jax.devices()[:1]), policy)
    for found in (restore_params(tmp_path, abstract), StoredParams(tmp_path).restore(abstract)):
        jax.tree.map(np.testing.assert_array_equal, found, policy)
    with pytest.raises(CheckpointError, match="cannot be read: it has no parameter policy/other"):
        restore_params(tmp_path, abstract | {"other": abstract["bias"]})


def test_each_stream_is_rewound_by_itself(saved):
    made = rewind(saved, 4, skip_examples=6, stream="prompts")
    assert (made.stream, made.skipped) == ("prompts", (40, 46))
    with pytest.raises(CheckpointError, match="no data stream 'images'; it has prompts, train"):
        rewind(saved, 4, stream="images")


def test_a_checkpoint_of_the_old_format_is_refused_in_one_line_and_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, trees(), {"next_example": 32, "data": "b", "skipped_examples": []})
    checkpoints.close()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(OldFormatError) as raised:
        Checkpoints(tmp_path).restore_latest(placed(mesh, trees()))
    assert f"INITIAL_CHECKPOINT={tmp_path}" in str(raised.value) and "\n" not in str(raised.value)
    assert Checkpoints(tmp_path).steps() == [4]


def test_a_key_with_a_dot_is_refused(tmp_path):
    """Orbax would join it with its parents by dots, and give {"a.b": 1, "a": {"b": 2}} back as 2 and 2."""
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"takes no key with a dot, found .*a\.b"):
        checkpoints.save(1, {"params": {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}}, METADATA)
    assert not checkpoints.steps()
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_one_layer_of_a_large_stacked_parameter_is_read_without_the_others(tmp_path, devices, monkeypatch):
    monkeypatch.setattr(manager, "CHUNK_BYTES", 2**12)
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    kernel = np.arange(6 * 16 * 64, dtype=np.float32).reshape(6, 16, 64)
    write_run_files(tmp_path, small_model(), None)
    checkpoints = Checkpoints(tmp_path)
    saved = {"params": {"layers": {"kernel": jax.device_put(kernel, split), "scale": jnp.ones((6, 16))}}}
    checkpoints.save(4, saved, METADATA)
    checkpoints.close()
    stored = StoredParams(tmp_path)
    assert stored.stored_together("layers/kernel") == 1 and stored.stored_together("layers/scale") == 6
    np.testing.assert_array_equal(stored.read("layers/kernel", slice(2, 3)), kernel[2:3])
    assert np.array_equal(Checkpoints(tmp_path).restore_latest(saved)[1]["params"]["layers"]["kernel"], kernel)
