"""The train step of a run compiled for a TPU slice that is not here."""

import importlib.util
import json
import subprocess
import sys

import pytest

COMMAND = [
    sys.executable, "tools/compile_for_tpu.py", "--gin_file=gin/models/tiny.gin", "--gin_file=gin/runs/pretrain.gin",
    "--gin_file=gin/hardware/v5e_16.gin",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_run_compiles_for_sixteen_chips(tmp_path, plain_environment, root):
    done = subprocess.run(
        [*COMMAND, "--json", tmp_path / "report.json"],
        capture_output=True, text=True, env=plain_environment, cwd=root,
    )
    assert done.returncode == 0, done.stderr
    assert "of 15.75 GiB" in done.stdout and "fits" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 16 and report["parameters"] == 5_264_640 and report["fits"]
    # Sharded: no chip holds more than its share of parameters and moments, and the step gathers no more than twice.
    assert report["memory_bytes"]["arguments"] < 1.3 * 3 * 4 * 5_264_640 / 16
    assert sum(report["state_bytes"].values()) < report["memory_need_bytes"]
    assert set(report["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = report["collectives"]["all-gather"]["payload_bytes"]
    assert gathered <= 1.05 * report["least_collectives"]["all-gather"]["payload_bytes"]
    assert 0 < report["mfu"]["low"] <= report["mfu"]["high"] < report["mfu_all_keys"]["high"] < 1
    speed, tokens = report["tokens_per_second_per_chip"], 4096 / 16
    assert speed["low"] == pytest.approx(tokens / report["seconds"]["high"]) and report["seconds"]["low"] > 0


def test_an_unknown_topology_is_one_line(plain_environment, root):
    done = subprocess.run(
        [*COMMAND, "--gin.HardwareConfig.topology=v9z:1x1"],
        capture_output=True, text=True, env=plain_environment, cwd=root,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "v9z:1x1" in errors[0] and "Traceback" not in done.stderr


def test_hardware_without_descriptions_is_one_line(plain_environment, root):
    done = subprocess.run(
        [*COMMAND[:-1], "--gin_file=gin/hardware/h200_8.gin"], capture_output=True, text=True, env=plain_environment,
        cwd=root,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "8 x NVIDIA H200" in errors[0]
