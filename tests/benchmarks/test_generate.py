"""The benchmark of generation runs, compares the tokens, and prints its table."""

import subprocess
import sys

import pytest


def test_it_runs_on_a_small_model(root, plain_environment):
    pytest.importorskip("torch", reason="compares with transformers' generate")
    pytest.importorskip("transformers", reason="compares with transformers' generate")
    arguments = ["--preset", "tiny", "--rounds", "1", "--new", "4", "--prompt", "8", "--batches", "1", "3"]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "generate.py", *arguments, "--bandwidth", "20"],
        capture_output=True,
        text=True,
        env=plain_environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal tokens: 100.0%") == 2 and done.stdout.count("qwen_jax") == 2
    assert "of limit" in done.stdout


def test_it_compares_the_engines_of_two_checkouts(root, plain_environment):
    pytest.importorskip("torch", reason="the benchmark's other half compares with transformers")
    arguments = ["--preset", "tiny", "--rounds", "1", "--new", "4", "--prompt", "8", "--batches", "2", "--base", root]
    arguments += ["--samples", "2"]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "generate.py", *arguments],
        capture_output=True,
        text=True,
        env=plain_environment,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[1:]] == ["prefill", "decoding"]


def test_it_says_what_it_can_do(root, plain_environment):
    pytest.importorskip("torch", reason="compares with transformers' generate")
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "generate.py", "--help"],
        capture_output=True,
        text=True,
        env=plain_environment,
        check=True,
    )
    assert "--bandwidth" in done.stdout and "1.8b" in done.stdout
