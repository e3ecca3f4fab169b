"""Runs those commands of docs/tpu_pods.md that need no pod, in a copy of the repository. 40 seconds."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tpu_pods.md"
BLOCK = re.compile(r"^```sh( libtpu)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(folder, needs_libtpu):
    for name in ("qwen_jax", "tasks", "tools", "gin"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "runs").mkdir()
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:]]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("XLA_FLAGS", None)
    shown = []
    for libtpu, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if bool(libtpu) == needs_libtpu:
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
            shown.append(result.stdout + result.stderr)
    return shown


def test_a_rehearsal_without_a_pod(tmp_path):
    first, second = run_blocks(tmp_path, needs_libtpu=False)
    assert "'fsdp': 8" in first and "'fsdp': 4" in second
    assert "goes on after step 4 (was 6) and passes over examples 32 to 47" in second
    rows = map(json.loads, (tmp_path / "runs" / "pods" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_rehearsal_of_compiling(tmp_path):
    (shown,) = run_blocks(tmp_path, needs_libtpu=True)
    assert "chip-hours per trillion tokens" in shown and "fastest that fits: remat=" in shown


def test_every_hardware_file_is_named():
    text = PAGE.read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "gin" / "hardware").glob("*.gin")} - {"cpu.gin", "h200.gin", "h200_8.gin"}
    assert files and not [name for name in files if f"`{name}`" not in text]
