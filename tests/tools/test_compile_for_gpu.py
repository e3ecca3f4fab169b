"""The train step of a run compiled for NVIDIA GPUs that are not here."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import gin
import jax
import pytest

from qwen_jax import train
from qwen_jax.hardware import HardwareConfig

gin.configurable(train.train)
COMMAND = [
    sys.executable,
    "tools/compile_for_gpu.py",
    "--gin_file=gin/runs/pretrain_tiny.gin",
    "--gin_file=gin/hardware/h200_8.gin",
]
PLUGIN = all(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "nvidia"))


@pytest.fixture
def compile_for_gpu(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tools"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # put back at the end: the tool adds to it
    gin.clear_config()
    return importlib.import_module("compile_for_gpu").main


@pytest.mark.slow
@pytest.mark.skipif(not PLUGIN, reason="compiling for GPUs needs JAX's plugin for CUDA and cuDNN")
def test_a_run_compiles_for_eight_gpus(tmp_path, compiler_environment, root):
    settings = ("--gin.ModelConfig.head_dim=128", "--gin.ModelConfig.dtype=bfloat16")
    command = [*COMMAND, *settings, "--json", tmp_path / "report.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment, cwd=root)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 8 and report["fits"] and report["attention_kernel"] == "cudnn"
    assert report["memory_bytes"]["arguments"] < 1.3 * 3 * 4 * report["parameters"] / 8
    kernels = {kernel["target"] for kernel in report["kernels"].values() if "cudnn" in kernel["target"]}
    assert len(kernels) == 2 and report["warnings"] == []
    assert 0.95 * report["model_flops"] < report["executed_flops"] < 2.5 * report["model_flops_all_keys"]
    assert set(report["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_the_report_is_that_of_the_compiled_program(compile_for_gpu, monkeypatch, tmp_path, capsys):
    """With the eight CPU devices of the tests in place of GPUs."""
    monkeypatch.setattr(HardwareConfig, "devices", lambda _: jax.devices()[:8])
    small = {"BATCH_SIZE": 16, "SEQUENCE_LENGTH": 32, "ModelConfig.num_layers": 1, "ModelConfig.vocab_size": 256}
    settings = [f"--gin.{name}={value}" for name, value in small.items()]
    path = tmp_path / "report.json"
    assert compile_for_gpu([*COMMAND[2:], *settings, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["hardware"] == "8 x NVIDIA H200" and report["topology"] == "cuda:1x1x8" and report["fits"]
    assert "of 139.00 GiB: fits" in capsys.readouterr().out
    assert os.environ["XLA_FLAGS"].endswith("--xla_gpu_autotune_level=0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            COMMAND[2:3],
            "name the GPUs to compile for with --gin_file: one of gin/hardware/h200.gin, gin/",
        ),
        ([COMMAND[2], "--gin_file=gin/hardware/v5e_16.gin"], "TPU v5e, 16 chips are no GPUs: tools/compile_for_tpu.py"),
        ([*COMMAND[2:], "--gin.HardwareConfig.topology=cuda:8"], "'cuda:8': expected cuda:1xMACHINESxGPUS, such as"),
        ([*COMMAND[2:], "--gin.HardwareConfig.topology=cuda:2x1x8"], "'cuda:2x1x8': expected cuda:1xMACHINESxGPUS"),
        ([*COMMAND[2:], "--gin.HardwareConfig.gpu=None"], "and a HardwareConfig.gpu, as gin/hardware/options/h200.gin"),
    ],
)
def test_what_cannot_be_compiled_for_is_named(compile_for_gpu, arguments, message):
    with pytest.raises(ValueError, match=message):
        compile_for_gpu(arguments)


@pytest.mark.skipif(PLUGIN, reason="JAX's plugin for CUDA is installed")
@pytest.mark.parametrize("there", [(), ("jax_cuda13_plugin",), ("jax_cuda13_plugin", "nvidia")])
def test_what_to_install_is_said(compile_for_gpu, tmp_path, monkeypatch, there):
    for package in there:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    version = jax.__version__
    try:
        with pytest.raises(ValueError, match=f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=="):
            compile_for_gpu(COMMAND[2:])
    finally:
        sys.modules.pop("nvidia", None)  # imported to look for cuDNN in it


def test_a_plugin_that_fails_is_one_line(compile_for_gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the plugin is of another version\nmore")

    monkeypatch.setattr("qwen_jax.hardware._installed", lambda _: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(
        ValueError, match="^JAX's plugin for CUDA describes no cuda:1x1x8: the plugin is of another ver"
    ):
        compile_for_gpu(COMMAND[2:])
