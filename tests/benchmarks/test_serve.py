"""The benchmark of the server runs, and prints its table."""

import subprocess
import sys

import pytest

pytest.importorskip("aiohttp", reason="the benchmark's client")
pytest.importorskip("psutil", reason="the benchmark measures processes")


def run(root, environment, *arguments):
    return subprocess.run(
        [sys.executable, root / "benchmarks" / "serve.py", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_it_says_what_it_can_do(root, plain_environment):
    done = run(root, plain_environment, "--help")
    assert done.returncode == 0 and "--llama_server" in done.stdout and "134m" in done.stdout


@pytest.mark.slow
def test_it_runs_on_a_small_model_with_and_without_the_prefix_cache(root, plain_environment):
    sizes = ["--clients", "2", "--requests", "1", "--rounds", "1", "--warm_up", "1", "--new", "16", "--system", "40"]
    done = run(root, plain_environment, "--preset", "tiny", "--prefix_cache", *sizes)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("float32")]
    assert [" ".join(line.split()[1:-8]) for line in lines] == ["qwen_jax", "qwen_jax without"]
    assert all(line.endswith("100.0%") for line in lines)
