"""The benchmark of the sandbox prints its figures on a file in the publisher's layout."""

import gzip
import json
import subprocess
import sys

import pytest

from qwen_jax import sandbox


def test_it_measures_programs_and_solutions(root, tmp_path):
    try:
        sandbox.run("")
    except sandbox.SandboxUnavailableError as error:
        pytest.skip(str(error))
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": "    return x\n",
    }
    row["test"] = "def check(candidate):\n    assert candidate(1) == 1\n"
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    command = [
        sys.executable,
        "benchmarks/sandbox.py",
        f"--data_dir={tmp_path}",
        "--rounds=1",
        "--count=2",
        "--workers=1",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "isolated, ours: " in done.stdout and "1 of 1 pass" in done.stdout, done.stderr
