"""Checkpoints in a bucket are complete or not there, whatever is killed, damaged or refused."""

import jax
import numpy as np
import pytest

from qwen_jax import files
from qwen_jax.checkpoints.bucket import BucketCheckpoints
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.rewind import rewind
from qwen_jax.checkpoints.run_folder import CheckpointError, saved_steps
from tests.object_stores import Fault, FaultProxy, environment, stores  # noqa: F401

METADATA = {"positions": {"train": 7}, "fingerprints": {"train": "a"}}


@pytest.fixture(params=["s3", "gs"])
def store(stores, request):  # noqa: F811
    """Each of the two servers."""
    return stores[request.param]


@pytest.fixture
def folder(store):
    """A new run folder of each."""
    return files.as_path(store.folder("run"))


def trees(value):
    return {"params": {"w": jax.numpy.full((4, 3), value, jax.numpy.float32)}}


def saved(folder, *steps, **options):
    checkpoints = BucketCheckpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, trees(step), METADATA)
    checkpoints.close()


def restored(folder):
    checkpoints = BucketCheckpoints(folder)
    try:
        step, found, metadata = checkpoints.restore_latest(jax.eval_shape(lambda: trees(0)))
    finally:
        checkpoints.close()
    assert metadata == METADATA
    np.testing.assert_array_equal(found["params"]["w"], np.full((4, 3), step))
    return step


def test_the_last_checkpoints_are_kept_and_restored(folder):
    saved(folder, 1, 2, 3, 4, 5, keep=2, keep_every=2)
    assert saved_steps(folder) == [2, 4, 5] and restored(folder) == 5
    assert Checkpoints.metadata(folder, 4) == METADATA
    kept = {path.relative_to(folder).parts[1] for path in files.find(f"{folder}/checkpoints/**")}
    assert kept == {"2", "4", "5"}


def test_the_commit_file_is_uploaded_last_and_deleted_first(store):
    folder = files.as_path(store.folder("run"))
    with FaultProxy(store) as proxy, environment(store.through(proxy)):
        saved(folder, 1, 2, keep=1)
    objects = [one for one in proxy.seen if "checkpoints" in one and one.split()[0] in ("PUT", "POST", "DELETE")]
    puts = [one for one in objects if one.startswith("PUT")]
    committed = [index for index, one in enumerate(puts) if one.endswith("/commit.json")]
    assert len(committed) == 2 and all("/checkpoints/1/" in one for one in puts[: committed[0] + 1])
    assert committed[1] == len(puts) - 1 and committed[0] > 5
    deleted = [one for one in objects if one.startswith("DELETE")]  # S3's lists of objects to delete are bodies
    assert store.scheme == "s3" or deleted[0].endswith("/checkpoints/1/commit.json")
    assert saved_steps(folder) == [2]


def test_an_upload_that_fails_is_one_line_and_leaves_no_checkpoint(store):
    folder = files.as_path(store.folder("run"))
    saved(folder, 1)
    limit = {"QWEN_JAX_STORE_RETRY_SECONDS": "1"}
    with FaultProxy(store) as proxy, environment(store.through(proxy) | limit):
        checkpoints = BucketCheckpoints(folder)
        proxy.faults = [Fault("PUT .*_METADATA", "503", count=1_000_000)]
        checkpoints.save(2, trees(2), METADATA)
        with pytest.raises(OSError, match="503 Service Unavailable") as found:
            checkpoints.wait()
        assert str(found.value).startswith(f"{folder}/checkpoints/2/") and "\n" not in str(found.value)
        checkpoints.close()
    assert saved_steps(folder) == [1] and restored(folder) == 1
    # The remains are gone, so that nothing of them can be mixed with what is saved next.
    assert not (folder / "checkpoints/2").exists()


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(folder, damage):
    saved(folder, 1, 2)
    (data,) = files.find(f"{folder}/checkpoints/2/params/d/*")
    data.unlink()
    if damage == "other bytes":
        data.write_bytes(b"x" * 100)
    assert restored(folder) == 1
    assert saved_steps(folder) == [1]
    assert (folder / "checkpoints/unreadable-2/commit.json").is_file()
    saved(folder, 2)
    assert restored(folder) == 2


def test_where_no_checkpoint_can_be_read_the_run_does_not_start_anew(folder):
    saved(folder, 1)
    for data in files.find(f"{folder}/checkpoints/1/params/d/*"):
        data.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        restored(folder)


def test_a_rewind_moves_later_checkpoints_also_when_it_was_killed(store, monkeypatch):
    from qwen_jax.checkpoints.run_folder import write_run_files
    from tests.fakes import small_model

    folder = files.as_path(store.folder("run"))
    write_run_files(folder, small_model(), None)
    saved(folder, 1, 2, 3)
    limit = {"QWEN_JAX_STORE_RETRY_SECONDS": "1"}
    with FaultProxy(store) as proxy, environment(store.through(proxy) | limit):
        proxy.faults = [Fault("PUT .*rewound_1.*commit", "503", count=1_000_000)]
        with pytest.raises(OSError, match="503"):
            rewind(folder, 1)
    assert saved_steps(folder) == [1, 2, 3]  # nothing has gone, and nothing counts twice
    assert saved_steps(folder / "rewound_1") == []
    made = rewind(folder, 1, skip_examples=8)  # finishes the first one
    assert saved_steps(folder) == [1] and saved_steps(folder / "rewound_1") == [2, 3]
    assert made.skipped == (7, 15) and restored(folder) == 1
