"""The benchmark of the train step runs, and both sides train alike."""

import re
import subprocess
import sys

import pytest


def test_it_runs_and_both_sides_train_alike(root, plain_environment):
    pytest.importorskip("torch", reason="the peer is torch")
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/train_step.py",
            "--preset=tiny",
            "--rounds=1",
            "--steps=1",
            "--batch=2",
            "--length=32",
            "--dtypes=float32",
            "--peers=eager",
        ],
        cwd=root,
        env=plain_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT THE SAME TRAINING" not in done.stdout and "left out" not in done.stderr
    losses = re.findall(r"\| (\S+), (\S+) \|$", done.stdout, re.MULTILINE)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert re.search(r"qwen_jax / fastest peer: \d", done.stdout)


@pytest.mark.slow
def test_with_pictures_both_sides_train_alike(root, plain_environment):
    pytest.importorskip("torch", reason="the peer is torch")
    sizes = ("--preset=tiny", "--rounds=1", "--steps=1", "--batch=1", "--length=160", "--peers=eager")
    command = [sys.executable, "benchmarks/vl_train_step.py", *sizes]
    done = subprocess.run(command, cwd=root, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NOT THE SAME TRAINING" not in done.stdout and "left out" not in done.stderr
    losses = re.findall(r"\| (\S+), (\S+) \|$", done.stdout, re.MULTILINE)
    assert len(losses) == 2 and losses[0] == losses[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train_step.py", "--rounds=0"], "error: --rounds must be at least 1, found 0"),
        (["vl_train_step.py", "--images=9"], "error: 9 pictures of 64 features do not fit in 512 tokens"),
        (
            ["compile_time.py", "--models=tinny"],
            "error: tinny for v5p_256: --gin_file=gin/runs/pretrain_tinny.gin: no such",
        ),
    ],
)
def test_bad_input_is_one_line(root, plain_environment, tmp_path, command, message):
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / command[0], command[1]],
        cwd=tmp_path,
        env=plain_environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
