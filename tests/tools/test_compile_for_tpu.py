"""The train step of a run compiled for a TPU slice that is not here."""

import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import gin
import jax
import pytest

from qwen_jax import train
from qwen_jax.configuration import load_gin
from qwen_jax.hardware import HardwareConfig
from qwen_jax.models.config import REMAT_POLICIES

ROOT = Path(__file__).resolve().parent.parent.parent
gin.configurable(train.train)
COMMAND = [
    sys.executable,
    "tools/compile_for_tpu.py",
    "--gin_file=gin/runs/pretrain_tiny.gin",
    "--gin_file=gin/hardware/v5e_16.gin",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_run_compiles_for_sixteen_chips(tmp_path, compiler_environment, root):
    done = subprocess.run(
        [*COMMAND, "--json", tmp_path / "report.json"],
        capture_output=True,
        text=True,
        env=compiler_environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    assert "of 15.75 GiB" in done.stdout and "fits" in done.stdout and "attention by splash" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 16 and report["parameters"] == 1_841_792 and report["fits"]
    # Sharded: no chip holds more than its share of parameters and moments, and the step gathers no more than twice.
    assert report["memory_bytes"]["arguments"] < 1.3 * 3 * 4 * 1_841_792 / 16
    assert sum(report["state_bytes"].values()) < report["memory_need_bytes"]
    assert set(report["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = report["collectives"]["all-gather"]["payload_bytes"]
    assert gathered <= 1.05 * report["least_collectives"]["all-gather"]["payload_bytes"]
    assert 0 < report["mfu"]["low"] <= report["mfu"]["high"] < report["mfu_all_keys"]["high"] < 1
    speed, tokens = report["tokens_per_second_per_chip"], 4096 / 16
    assert speed["low"] == pytest.approx(tokens / report["seconds"]["high"]) and report["seconds"]["low"] > 0


def test_an_unknown_topology_is_one_line(compiler_environment, root):
    done = subprocess.run(
        [*COMMAND, "--gin.HardwareConfig.topology=v9z:1x1"],
        capture_output=True,
        text=True,
        env=compiler_environment,
        cwd=root,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "v9z:1x1" in errors[0] and "Traceback" not in done.stderr
    assert importlib.util.find_spec("libtpu") is None or "Topologies that exist: v4:2x2x1" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run and the hardware"),
        (COMMAND[3:], "name a run and the hardware"),
        (["--gin_file=gin/runs/pretrain.gin", *COMMAND[3:]], "BATCH_SIZE, .* and WARMUP_STEPS are not set"),
        (COMMAND[2:3], "one of gin/hardware/tpu7x_64.gin, gin/hardware/v5e_16"),
        ([*COMMAND[2:], "--gin.HardwareConfig.hbm_gib=much"], "hbm_gib must be a positive number, found 'much'"),
    ],
)
def test_what_is_missing_or_no_number_is_named(root, monkeypatch, arguments, message):
    monkeypatch.syspath_prepend(str(root / "tools"))
    gin.clear_config()
    with pytest.raises(ValueError, match=message):
        importlib.import_module("compile_for_tpu").main(arguments)


def test_hardware_of_the_other_tool_is_one_line(compiler_environment, root):
    done = subprocess.run(
        [*COMMAND[:-1], "--gin_file=gin/hardware/h200_8.gin"],
        capture_output=True,
        text=True,
        env=compiler_environment,
        cwd=root,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert errors == ["error: 8 x NVIDIA H200 are no TPUs: tools/compile_for_gpu.py compiles for them"]


@pytest.fixture
def compile_here(root, monkeypatch, tmp_path, capsys):
    """Runs the tool in this process, with the eight CPU devices of the tests in place of a pod."""
    monkeypatch.syspath_prepend(str(root / "tools"))
    tool = importlib.import_module("compile_for_tpu")
    monkeypatch.setattr(HardwareConfig, "devices", lambda _: jax.devices()[:8])

    def compile_it(*flags, run="pretrain_tiny"):
        gin.clear_config()
        small = {
            "BATCH_SIZE": 16,
            "SEQUENCE_LENGTH": 32,
            "ModelConfig.num_layers": 2,
            "ModelConfig.hidden_size": 64,
            "ModelConfig.head_dim": 32,
            "ModelConfig.ffn_size": 128,
            "ModelConfig.vocab_size": 512,
            "ModelConfig.attention_kernel": "xla",
            "ModelConfig.dtype": "float32",
            "train.compiler_options": None,
        }
        settings = [f"--gin.{name}={value}" for name, value in small.items()]
        report = tmp_path / "made" / "report.json"
        files = [f"--gin_file=gin/runs/{run}.gin", COMMAND[3]]
        code = tool.main([*files, *settings, *flags, "--json", str(report)])
        return code, capsys.readouterr().out, json.loads(report.read_text())

    return compile_it


@pytest.mark.parametrize(("recipe", "stage"), [("pmp_tiny", "reward"), ("dpo_tiny", "dpo")])
def test_recipes_on_pairs_are_compiled(compile_here, recipe, stage):
    flags = (f"--program={stage}", "--gin.MeshConfig.tensor=2", "--gin.INITIAL_CHECKPOINT=none")
    code, shown, report = compile_here(*flags, run=recipe)
    assert code == 0 and report["fits"] and "512 tokens a step" in shown and report["program"] == stage


@pytest.mark.parametrize(
    ("stage", "recipe"), [("sft", "pretrain_tiny"), ("sft", "dpo_tiny"), ("reward", "sft_tiny"), ("dpo", "reward_tiny")]
)
def test_a_recipe_of_another_stage_is_refused(compile_here, stage, recipe):
    with pytest.raises(ValueError, match=f"needs a run of that stage: --gin_file=gin/runs/{stage}_7b.gin"):
        compile_here(f"--program={stage}", "--gin.INITIAL_CHECKPOINT=none", run=recipe)


@pytest.mark.parametrize(("program", "tokens"), [("train", 16 * 32), ("prefill", 16 * 32), ("decode", 16)])
def test_every_program_is_compiled_and_read(compile_here, program, tokens):
    code, shown, report = compile_here(f"--program={program}", "--gin.MeshConfig.data=2", "--gin.MeshConfig.tensor=2")
    assert code == 0 and "chip-hours per trillion tokens" in shown
    assert report["program"] == program and report["tokens_per_step"] == tokens and report["fits"]
    assert report["attention_kernel"] == "xla" and "attention by xla" in shown
    assert report["mesh"] == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    # No pass does less than the model's arithmetic, and without recomputation not much more than all keys.
    assert 0.95 * report["model_flops"] < report["executed_flops"] < 2.5 * report["model_flops_all_keys"]
    assert report["memory_bytes"]["arguments"] >= report["state_bytes"]["parameters"]
    assert 0 < report["seconds"]["low"] <= report["seconds"]["high"]
    page = (ROOT / "docs" / "reference" / "compile_report.md").read_text(encoding="utf-8").partition("# Fields")[2]
    rows = [row.split("|")[1] for row in page.partition("\n\n**")[0].splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(report)


PPO = [
    "--gin.PRETRAINING_COEFFICIENT=1.0",
    "--gin.PRETRAINING=none",
    "--gin.INITIAL_CHECKPOINT=none",
    "--gin.PROMPT_LENGTH=16",
    "--gin.PRETRAINING_ROWS=2",
    "--gin.FROZEN_DTYPE=bfloat16",
    "--gin.rlhf.compiler_options=None",
]


@pytest.mark.parametrize(("program", "tokens"), [("ppo_update", 16 * 32 * (1 + 1 + 2)), ("ppo_rollout", 64)])
def test_programs_of_ppo_count_all_its_models(compile_here, program, tokens):
    slots = "--gin.ROLLOUT_SLOTS=64"
    code, _, report = compile_here(f"--program={program}", *PPO, slots, run="ppo_tiny")
    assert code == 0 and report["fits"] and report["tokens_per_step"] == tokens
    parts, one_model = report["state_bytes"], 4 * report["parameters"] / 8
    prefix = "training " if program == "ppo_rollout" else ""
    # Policy and value model in float32, with two moments each; reference and reward model in bfloat16.
    assert parts[f"{prefix}parameters"] == pytest.approx(2 * one_model, rel=0.2)
    assert parts[f"{prefix}optimizer"] == pytest.approx(4 * one_model, rel=0.2)
    assert parts[f"{prefix}frozen parameters"] == pytest.approx(one_model, rel=0.2)
    assert report["memory_need_bytes"] > sum(parts.values()) - parts.get("gradients", 0)


def test_ppo_needs_a_run_of_ppo(compile_here):
    with pytest.raises(ValueError, match="needs a run of PPO or GRPO"):
        compile_here("--program=ppo_update")


def test_what_does_not_fit_has_its_own_exit_code(compile_here):
    """Less than what a step needs; and less than the state alone, said before compiling."""
    _, _, report = compile_here()
    state, need = sum(report["state_bytes"].values()), report["memory_need_bytes"]
    assert state < need
    code, shown, report = compile_here(f"--gin.HardwareConfig.hbm_gib={(state + need) / 2 / 2**30}")
    assert code == 1 and "GiB: DOES NOT FIT" in shown and report["fits"] is False
    code, shown, report = compile_here(f"--gin.HardwareConfig.hbm_gib={0.9 * state / 2**30}")
    assert code == 1 and "DOES NOT FIT: too little memory" in shown and report["fits"] is False
    assert report["memory_limit_bytes"] == pytest.approx(0.9 * state, abs=1) and report["program"] == "train"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.MeshConfig.tensor=3"], "does not divide 8 device"),
        (["--gin.BATCH_SIZE=9"], "multiple of 8"),
        (["--gin.MeshConfig.tensor=8", "--gin.ModelConfig.num_kv_heads=2"], "the mesh does not divide the model"),
    ],
)
@pytest.mark.parametrize("program", ["train", "decode"])
def test_what_does_not_divide_is_refused(compile_here, program, flags, message):
    with pytest.raises(ValueError, match=message):
        compile_here(f"--program={program}", *flags)


def test_rows_that_training_would_refuse_are_refused(compile_here):
    with pytest.raises(ValueError, match="SEQUENCE_LENGTH 2048 is more than ModelConfig.context_length 1024"):
        compile_here("--gin.SEQUENCE_LENGTH=2048")


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "gin" / "hardware").glob("*.gin")))
def test_every_hardware_file_can_be_read_with_a_run(root, file):
    load_gin([COMMAND[2].removeprefix("--gin_file="), f"gin/hardware/{file}.gin"], ["OUTPUT_DIR=none"])
    hardware = gin.get_configurable("HardwareConfig")()
    assert hardware.hbm_bytes > 2**30 and hardware.peak_tflops > 0 and (hardware.topology is None) == (file == "cpu")
    assert dataclasses.replace(hardware, slices=1).devices_per_chip == (2 if file.startswith("tpu7x") else 1)
    assert gin.get_configurable("MeshConfig")().fsdp == -1


@pytest.mark.parametrize("model", ["tiny", "1_8b", "7b", "14b"])
def test_every_accelerator_says_what_it_holds_of_every_model(model):
    """A run of the report's batch on any of them needs no further flag for its memory."""
    for file in sorted(ROOT.glob("gin/hardware/*.gin")):
        if file.stem != "cpu":
            load_gin([f"gin/runs/pretrain_{model}.gin", str(file)], ["OUTPUT_DIR=none"])
            settings = gin.get_bindings("train")
            assert settings["trainer"].tokens_per_device >= 4096 and settings["trainer"].accumulation_steps is None
            assert settings["model"].remat in REMAT_POLICIES
