"""The benchmark of PPO: both sides serve iterations of equal work; theirs only where trl is installed."""

import importlib.util
import subprocess
import sys

import pytest

TINY = ["--preset=tiny", "--rounds=1", "--rows=4", "--rows_at_once=2", "--prompt=8", "--response=8", "--epochs=2"]


def run(root, environment, *arguments):
    return subprocess.run(
        [sys.executable, root / "benchmarks" / "ppo.py", *arguments],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_our_side_serves_iterations_and_their_parts(tool, root, monkeypatch, plain_environment, tmp_path):
    """In a process of its own, as a side of the comparison."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    ppo, config = tool("ppo"), tool("train_step").preset("tiny", 16)
    job, _ = ppo.job_of(config, tmp_path, ppo.parse([*TINY, "--peer_python=none"]))
    monkeypatch.setenv("XLA_FLAGS", plain_environment["XLA_FLAGS"])
    side = tool("workers").Side("qwen_jax", str(root / "benchmarks/ppo.py"), job)
    tool("workers").take_turns([side], rounds=1, units=1, warm_up=1)
    (answer,) = side.rounds
    assert all(answer[part][0] > 0 for part in ppo.PARTS)
    assert sum(answer[part][0] for part in ppo.PARTS) < answer["seconds"] and answer["cpu"] > 0
    assert side.recorded("kl")[0] == pytest.approx(0, abs=1e-6) and len(side.recorded("kl")) == 2
    assert answer["peak_bytes"] is None or answer["peak_bytes"] > 10**8


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the peer is trl, which is not installed here")
def test_both_sides_draw_alike(root, plain_environment):
    done = run(root, plain_environment, *TINY, f"--peer_python={sys.executable}", "--peers", "4", "2/4/checkpointing")
    assert done.returncode == 0, done.stderr
    assert "NOT THE SAME ROLLOUT" not in done.stdout and done.stdout.count("| trl, ") == 2
    assert "times the samples/s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the interpreter of an environment with trl: --peer_python"),
        (("--peer_python=python", "--peers", "3"), "--peers 3: expected UPDATE[/FORWARD][/checkpointing]"),
        (("--peer_python=python", "--rows=5"), "--rows 5 must be a multiple of --responses 2 and --minibatches 1"),
    ],
)
def test_mistakes_are_one_line(root, plain_environment, arguments, message):
    done = run(root, plain_environment, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
