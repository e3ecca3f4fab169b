"""tools/pods.py: programs of all stages, compiled once and kept, and what they would cost."""

import importlib
import importlib.util
import json
import re
import subprocess

import gin
import jax
import pytest

from qwen_jax import rlhf, train
from qwen_jax.configuration import load_gin
from qwen_jax.hardware import HardwareConfig

gin.configurable(train.train)
gin.configurable(rlhf.rlhf)
FAST = {"fits": True, "limit_gib": 95.74, "memory_gib": 50.0, "seconds": [2.0, 3.0]}


@pytest.fixture
def pods(tool):
    return tool("pods")


def test_the_command_of_every_stage_is_a_run_of_that_size(pods):
    for stage, one in pods.STAGES.items():
        for size in one.updates:
            for chip in pods.CHIPS:
                words = pods.command(stage, size, chip)[2:]
                named = [word.removeprefix("--gin_file=") for word in words if word.startswith("--gin_file=")]
                bound = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
                load_gin(named, ["OUTPUT_DIR=none", *bound])
                settings = gin.get_bindings("rlhf" if "ppo" in one.program else "train")
                assert settings["model"].hidden_size == {"7b": 4096, "14b": 5120}[size]
                hardware = gin.get_configurable("HardwareConfig")()
                chips = pods.chips_of(one.hardware[chip])
                assert re.search(rf"\b{chips} (chips|x NVIDIA)", hardware.name)
                trainer, mesh = settings["trainer"], gin.get_configurable("MeshConfig")()
                assert trainer.batch_size % (chips // (mesh.tensor * mesh.sequence)) == 0, words
                if one.recipe != "ppo" and one.like == "" and stage not in ("pmp", "reward"):
                    assert settings["trainer"].train_steps == one.updates[size]
                gin.clear_config()


def test_a_stage_with_the_program_of_another_has_its_shapes(pods):
    for stage, one in pods.STAGES.items():
        for size in one.updates if one.like else ():
            shapes = []
            for recipe in (stage, one.like):
                load_gin([f"gin/runs/{recipe}_{size}.gin"], ["OUTPUT_DIR=none", "INITIAL_CHECKPOINT=none"])
                settings = gin.get_bindings("train")
                trainer = settings["trainer"]
                shapes.append((settings["model"], trainer.batch_size, trainer.sequence_length, settings["packing"]))
                gin.clear_config()
            assert shapes[0] == shapes[1]


def test_chip_hours_and_cost_are_sums_of_what_is_known(pods):
    records = {"sft_7b/v5p_64": FAST, "math_sft_7b/v5p_64": {"fits": False, "limit_gib": 95.74, "memory_gib": 99.0}}
    made = pods.table(["sft", "code", "code_sft", "math_sft"], ["7b"], ["v5p"], records, {"v5p": 10.0})
    lines = made.splitlines()
    # 4,000 updates of 2 to 3 s on 64 chips are 142 to 213 chip-hours.
    assert "| Qwen-Chat: SFT | 64 | 4,000 | 2–3 | 50 | 142–213 | 1,422–2,133 |" in lines
    assert "| Code-Qwen | 64 | 21,458 | not compiled |  | – | – |" in lines
    assert "| Math-Qwen-Chat | 64 | 50,000 | does not fit | 99.0 | – | – |" in lines
    assert "| **sum** without 3 of 4 stages | | | | | **142–213** | **1,422–2,133** |" in lines


def test_a_stage_is_compiled_once(pods, tool, tmp_path, monkeypatch, capsys):
    compiler = tool("compile_for_tpu")
    monkeypatch.setattr(HardwareConfig, "devices", lambda _: jax.devices()[:8])
    small = ["BATCH_SIZE=8", "SEQUENCE_LENGTH=32", "ModelConfig.num_layers=1", "ModelConfig.hidden_size=32"]
    small += ["ModelConfig.num_heads=1", "ModelConfig.head_dim=32", "ModelConfig.ffn_size=64", "WARMUP_STEPS=1"]
    small += ["ModelConfig.vocab_size=256", "ModelConfig.dtype=float32", "ModelConfig.attention_kernel=xla"]
    compiled = []

    def compile_one(*which):
        gin.clear_config()
        compiled.append(which)
        path = tmp_path / "report.json"
        flags = [f"--gin.{binding}" for binding in [*small, "train.compiler_options=None"]]
        assert compiler.main([*pods.command(*which)[1:], *flags, "--json", str(path)]) == 0
        return pods.record(json.loads(path.read_text()))

    monkeypatch.setattr(pods, "compile_one", compile_one)
    flags = ["--stages=sft", "--sizes=7b", "--chips=v5p", f"--records={tmp_path / 'pods.json'}"]
    flags += [f"--output={tmp_path}"]
    assert pods.main(flags) == 0 and pods.main(flags) == 0 and len(compiled) == 1
    (kept,) = json.loads((tmp_path / "pods.json").read_text()).values()
    assert kept["fits"] and 0 < kept["seconds"][0] <= kept["seconds"][1]
    assert "| Qwen-Chat: SFT | 64 | 4,000 | " in (tmp_path / "pods.md").read_text()
    assert pods.main([*flags, "--again=sft_7b/v5p_64"]) == 0 and len(compiled) == 2
    with pytest.raises(ValueError, match="--again sft_8b: no such program; one is sft_7b/v5p_64"):
        pods.main([*flags, "--again=sft_8b"])


def test_a_program_that_is_not_compiled_is_named_and_does_not_stop_the_others(pods, tmp_path, monkeypatch):
    def compile_one(stage, size, chip):
        if stage == "code":
            raise subprocess.CalledProcessError(2, ["compile"])
        return FAST

    monkeypatch.setattr(pods, "compile_one", compile_one)
    flags = ["--stages=code,sft", "--sizes=7b", "--chips=h200", f"--records={tmp_path / 'pods.json'}"]
    with pytest.raises(ValueError, match=r"not compiled, for the reasons above: code_7b/h200_256 \(exit code 2\)"):
        pods.main([*flags, f"--output={tmp_path}"])
    assert json.loads((tmp_path / "pods.json").read_text()) == {"sft_7b/h200_8": FAST}
    assert "### Qwen-7B on NVIDIA H200, $3.80 a chip-hour" in (tmp_path / "pods.md").read_text()


def test_stages_that_no_size_has_are_named(pods, tmp_path):
    with pytest.raises(ValueError, match="no stage of .* is one of 14b"):
        alone = next(name for name, stage in pods.STAGES.items() if "14b" not in stage.updates)
        pods.main(["--stages", alone, "--sizes", "14b", "--again", "x", "--records", str(tmp_path / "records.json")])


@pytest.mark.parametrize("more", [{}, {"message": "too little memory"}])
def test_what_does_not_fit_is_kept(pods, more):
    report = {"fits": False, "memory_limit_bytes": 2**34, "memory_need_bytes": 2**35, **more}
    assert pods.record(report) == {"fits": False, "limit_gib": 16.0, "memory_gib": 32.0, **more}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_sft_of_7b_needs_what_the_records_say(pods, compiler_environment, monkeypatch):
    for name, value in compiler_environment.items():
        monkeypatch.setenv(name, value)
    found = pods.compile_one("sft", "7b", "v5p")
    recorded = json.loads(pods.RECORDS.read_text())["sft_7b/v5p_64"]
    assert found["memory_gib"] == pytest.approx(recorded["memory_gib"], rel=0.1)
    assert found["seconds"] == pytest.approx(recorded["seconds"], rel=0.2)
