"""The benchmark of the train step runs, and both sides train alike."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_runs_and_both_sides_train_alike():
    pytest.importorskip("torch", reason="the peer is torch")
    # Without the virtual devices of the other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", "--preset=tiny", "--rounds=1", "--steps=1", "--batch=2",
         "--length=32", "--dtypes=float32", "--peers=eager"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT THE SAME TRAINING" not in done.stdout and "left out" not in done.stderr
    losses = re.findall(r"\| (\S+), (\S+) \|$", done.stdout, re.MULTILINE)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert re.search(r"qwen_jax / fastest peer: \d", done.stdout)
