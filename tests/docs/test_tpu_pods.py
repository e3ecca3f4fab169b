"""Runs those commands of docs/how_to/tpu_pods.md that need no pod, in a copy of the repository. 40 seconds."""

import importlib.util
import json

import pytest

from tests.pages import ROOT, blocks, copy_repository, shell

PAGE = ROOT / "docs" / "how_to" / "tpu_pods.md"


def run_blocks(folder, wanted, **environment):
    copy_repository(folder)
    (folder / "runs").mkdir()
    done = [shell(text, folder, **environment) for kind, text in blocks(PAGE.name) if kind == wanted]
    return [one.stdout + one.stderr for one in done]


def test_a_rehearsal_without_a_pod(tmp_path):
    first, second = run_blocks(tmp_path, "sh")
    assert "'fsdp': 8" in first and "'fsdp': 4" in second
    assert "goes on after step 4 (was 6) and passes over examples 32 to 47" in second
    rows = map(json.loads, (tmp_path / "runs" / "pods" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_rehearsal_of_compiling(tmp_path):
    # As a user's: what the tests set to compile quickly would make other programs.
    (shown,) = run_blocks(tmp_path, "sh libtpu", XLA_FLAGS="", JAX_ENABLE_COMPILATION_CACHE="false")
    assert "chip-hours per trillion tokens" in shown and "fastest that fits: remat=" in shown


def test_every_hardware_file_is_named():
    text = PAGE.read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "gin" / "hardware").glob("*.gin")} - {"cpu.gin"}
    of_gpus = {name for name in files if name.startswith("h200")}
    assert of_gpus and files > of_gpus and not [name for name in files - of_gpus if f"`{name}`" not in text]
    text = (PAGE.parent / "gpu_clusters.md").read_text(encoding="utf-8")
    assert not [name for name in of_gpus if f"`{name}`" not in text]
