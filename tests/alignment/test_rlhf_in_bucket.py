"""`python -m qwen_jax.rlhf` with run, data, policy and reward model in a bucket, stopped and started again."""

import signal
import subprocess

import jax
import numpy as np
import pytest

from qwen_jax import files
from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.checkpoints.run_folder import saved_steps
from tests.alignment.test_rlhf_killed import SETTINGS, rows_of, world  # noqa: F401
from tests.object_stores import FaultProxy, environment, stores  # noqa: F401
from tests.warm_python import python

STEPS = 8
CHANGES = {"TRAIN_STEPS": STEPS, "KEEP_CHECKPOINTS": 1}


def start(place, compiled, root, plain_environment, variables):
    settings = SETTINGS | CHANGES
    settings |= {
        "OUTPUT_DIR": place / "run",
        "CACHE_DIR": place / "cache",
        "COMPILATION_CACHE": compiled,
        "VOCABULARY": place / "policy.tiktoken",
        "INITIAL_CHECKPOINT": place / "policy",
        "REWARD_CHECKPOINT": place / "reward",
        "queries.pattern": place / "prompts.jsonl",
        "local_files.pattern": place / "text.jsonl",
    }
    flags = ["--gin_file=gin/runs/ppo_tiny.gin", *(f"--gin.{name}={value}" for name, value in settings.items())]
    command = [python(), "-m", "qwen_jax.rlhf", *flags]
    return subprocess.Popen(command, cwd=root, env=plain_environment | variables, stderr=subprocess.PIPE, text=True)


def ended(process):
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_reinforcement_learning_in_a_bucket_is_that_of_a_disk(
    world,  # noqa: F811
    stores,  # noqa: F811
    scheme,
    root,
    plain_environment,
    tmp_path,
):
    url, local = files.as_path(stores[scheme].folder()), tmp_path / "local"
    rest = (tmp_path / "compiled", root, plain_environment)
    for name in ("policy", "reward"):
        files.write_text(url / f"{name}.tiktoken", (world / f"{name}.tiktoken").read_text())
    from qwen_jax.conversion import convert

    for place in (local, url):
        for name in ("policy", "reward"):
            convert("orbax", world / name, "orbax", place / name, progress=False)
    (local / "policy.tiktoken").write_bytes((world / "policy.tiktoken").read_bytes())
    for name in ("prompts.jsonl", "text.jsonl"):
        for place in (local, url):
            files.copy_file(world / name, place / name)
    ended(start(local, *rest, {}))
    with FaultProxy(stores[scheme]) as proxy, environment(stores[scheme].through(proxy)):
        variables = stores[scheme].through(proxy)
        first = start(url, *rest, variables)
        proxy.wait_for(r"PUT .*/checkpoints/4/commit\.json", timeout=3000)
        first.send_signal(signal.SIGTERM)
        ended(first)
        ended(start(url, *rest, variables))
    assert saved_steps(url / "run") == saved_steps(local / "run") == [STEPS]
    assert rows_of(url / "run") == rows_of(local / "run")
    jax.tree.map(np.testing.assert_array_equal, load_params(url / "run")[1], load_params(local / "run")[1])
