"""Compiled programs read as text: a small one whose numbers are worked out by hand, and larger ones against the
yardstick by which the team measures peers. 10 seconds; the slow one half a minute."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.hardware import HardwareConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.programs.account import account
from qwen_jax.programs.compiler_log import exposed_cycles, needed_when_too_large, program_hbm_bytes
from qwen_jax.programs.estimate import estimate_time
from qwen_jax.programs.hlo import Program
from qwen_jax.programs.report import Work, make_report
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.program import compile_run
from tests.fakes import small_model

V5E = HardwareConfig(
    name="TPU v5e",
    topology="v5e:4x4",
    wrap=(False, False, False),
    hbm_gib=15.75,
    peak_tflops=197,
    hbm_gbps=819,
    link_gbps=180,
    clock_ghz=1.5,
)
# Four trips of a loop (its length is only in its condition): a product of [8, 128] by [128, 256] fused with an
# all-gather that overlaps it, written twice as one chain; an attention kernel; a gather started and awaited. Then an
# all-reduce over pairs and a reduce-scatter over all, which overlap nothing.
PROGRAM = (Path(__file__).parent / "small_program.hlo").read_text()


# Calls of cuDNN's attention as XLA for CUDA writes them: 2 rows of 64 queries of 3 heads of 32, 128 keys.
CUDNN = """HloModule jit_f, is_scheduled=true, num_partitions=1

ENTRY %main (q: bf16[2,3,64,32], k: bf16[2,3,128,32]) -> bf16[2,3,64,32] {
  %q = bf16[2,3,64,32]{3,1,2,0} parameter(0)
  %k = bf16[2,3,128,32]{3,1,2,0} parameter(1)
  %forward.1 = (bf16[2,3,64,32]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,64,3,32]{3,2,1,0}, bf16[2,128,3,32]{3,2,1,0}, bf16[2,128,3,32]{3,2,1,0}}, backend_config={"mask_type": "CAUSAL"}
  %out = bf16[2,3,64,32]{3,1,2,0} get-tuple-element(%forward.1), index=0
  %backward.2 = (bf16[2,3,64,32]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %out), custom_call_target="__cudnn$fmhaSoftmaxBackward", operand_layout_constraints={bf16[2,64,3,32]{3,2,1,0}, bf16[2,128,3,32]{3,2,1,0}, bf16[2,128,3,32]{3,2,1,0}, bf16[2,64,3,32]{3,2,1,0}}, backend_config={"mask_type": "NO_MASK"}
  ROOT %gradient = bf16[2,3,64,32]{3,1,2,0} get-tuple-element(%backward.2), index=0
}
"""  # noqa: E501


def test_operations_of_attention_by_cudnn():
    found = account(Program(CUDNN))
    product = 2 * (2 * 64 * 3 * 32) * 128
    assert found.warnings == []
    assert found.kernels["forward"].flops == 2 * product / 2 and found.kernels["backward"].flops == 5 * product


def test_a_small_program_by_hand():
    found = account(Program(PROGRAM))
    assert found.loops == [("loop", 4, True)] and found.warnings == []
    assert found.product_flops == 4 * 2 * 8 * 128 * 256
    # Scores and weighted values: 2 products of [2, 4, 64, 32] with 64 keys, half of the square.
    assert found.kernel_flops == 4 * 2 * 2 * (2 * 4 * 64 * 32) * 64 / 2
    assert found.kernels["splash_mha_fwd"].calls == 4
    gather, reduce, scatter = (found.collectives[k] for k in ("all-gather", "all-reduce", "reduce-scatter"))
    whole = 128 * 256 * 2
    assert (gather.count, gather.payload_bytes, gather.wire_bytes) == (8, 8 * whole, 8 * whole * 3 / 4)
    assert gather.synchronous_wire_bytes == 0
    assert (reduce.payload_bytes, reduce.wire_bytes, reduce.synchronous_wire_bytes) == (256, 256, 256)
    assert (scatter.payload_bytes, scatter.wire_bytes, scatter.synchronous_wire_bytes) == (256, 192, 192)
    assert found.cycles == 4 * 3000
    # Of the first fusion x, w and the product move (the gathered result stays on the chip, the shard goes to the
    # collective); of the second nothing; of the counter three words.
    assert found.hbm_bytes == 4 * (2 * (8 * 128 + 128 * 256 + 8 * 256) + 12)


# As libtpu writes for TPU v7: a saved activation of one layer is taken out of those of all, which another fusion inside
# of this one first lays out anew.
SLICE_OF_A_RELAID_STACK = """HloModule m, num_partitions=1

%relay (all: bf16[32,64,128]) -> bf16[32,64,128] {
  %all = bf16[32,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %laid = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} copy(%all)
}

%take (saved: bf16[32,64,128], layer: s32[]) -> bf16[1,64,128] {
  %saved = bf16[32,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %stack = bf16[32,64,128]{2,1,0:T(8,128)(2,1)} fusion(%saved), kind=kLoop, calls=%relay
  %layer = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = bf16[1,64,128]{2,1,0} dynamic-slice(%stack, %layer, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

ENTRY %main (a: bf16[32,64,128], l: s32[]) -> bf16[1,64,128] {
  %a = bf16[32,64,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %l = s32[] parameter(1)
  ROOT %taken = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %l), kind=kLoop, calls=%take
}
"""


def test_a_layer_taken_from_a_stack_in_another_layout_counts_as_the_layer():
    layer = 2 * 64 * 128
    assert account(Program(SLICE_OF_A_RELAID_STACK)).hbm_bytes == 2 * layer + 4


def test_the_time_of_a_small_program_by_hand():
    time = estimate_time(account(Program(PROGRAM)), V5E)
    assert time.cycles == pytest.approx(12000 / 1.5e9)
    traffic, kernels = 2 * (8 * 128 + 128 * 256 + 8 * 256), 4 * 2 * 2 * (2 * 4 * 64 * 32) * 32
    assert time.roofline == pytest.approx(4 * (traffic + 12) / (0.85 * 819e9))
    assert time.kernels == pytest.approx(kernels / (0.5 * 197e12))
    assert time.synchronous == pytest.approx((256 + 192) / 180e9)
    assert time.asynchronous == pytest.approx(8 * 128 * 256 * 2 * 0.75 / 180e9)
    assert time.low == time.synchronous + max(time.roofline + time.kernels, time.asynchronous)
    assert time.high == time.synchronous + time.cycles + time.kernels


def test_what_the_compiler_says_beside():
    log = (
        "Statistics before scheduling:\nFor computation: body, module jit_step\nTotal wasted cycles: 9e9\n"
        "Statistics after scheduling:\nFor computation: body, module jit_step\nWasted cycles for all-gather: 1.5e+03\n"
        "Total wasted cycles: 1500\nTotal cycles: 8000\nProgram hbm requirement 17.5M:\n"
    )
    assert program_hbm_bytes(log) == 17.5 * 2**20 and program_hbm_bytes("") is None
    assert exposed_cycles(log) == {"body": (1500.0, {"all-gather": 1500.0})}
    assert estimate_time(account(Program(PROGRAM)), V5E, log).exposed == pytest.approx(4 * 1500 / 1.5e9)
    given_up = "RESOURCE_EXHAUSTED: … Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded …"
    assert needed_when_too_large(given_up) == 20.5 * 2**30 and needed_when_too_large("INTERNAL: …") is None
    given_up = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.5G) exceeds "
        "available HBM (15.75G)."
    )
    assert needed_when_too_large(given_up) == 61.5 * 2**30
    # Of the chip's small vector memory: no question of fitting, but of block sizes.
    assert needed_when_too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M") is None


def test_options_that_the_chip_does_not_support_are_told():
    """As libtpu 0.0.42 says of v5e's fusions on other chips, some hundred times a program."""
    said = (
        "Continuation fusion for AllGather is enabled on platform viperfish (variant: ), but it is not "
        "supported/recommended on platforms other than Viperlite. Please use it at your own risk"
    )
    log = f"W1124 17:54:02.667651   10683 flag_utils.cc:282] {said}\n" * 2
    memory = {"arguments": 1, "outputs": 1, "aliased": 1, "temporaries": 1, "need": 2}
    work = Work(parameters=1, tokens=1, flops_per_token=1.0, flops_per_token_all_keys=1.0, least={})
    quiet, warned = (make_report(PROGRAM, work, V5E, {"fsdp": 4}, memory, text)["warnings"] for text in ("", log))
    assert warned == [*quiet, said]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule jit_step\n")


def compare(text, devices, yardstick, hardware, device_kind, log=None):
    theirs = yardstick.report_text(text, devices, device_kind=device_kind, lhs_log=log)
    found = account(Program(text))
    time = estimate_time(found, hardware, log)
    assert found.product_flops == theirs["matmul_flops"] and found.kernel_flops == theirs["custom_call_flops"]
    assert found.cycles == theirs["estimated_cycles"] and found.hbm_bytes == theirs["hbm_traffic_bytes"]
    ours = {
        kind: (t.count, t.payload_bytes, t.wire_bytes, t.synchronous_wire_bytes)
        for kind, t in found.collectives.items()
    }
    assert ours == {kind: tuple(total.values()) for kind, total in theirs["collectives"].items()}
    assert [trips for _, trips, _ in found.loops] == [loop["trips"] for loop in theirs["loops"]]
    assert time.low == pytest.approx(theirs["roofline_overlap_s"])
    assert time.cycles is None or time.high == pytest.approx(theirs["est_overlap_s"])
    if log:
        assert time.exposed == pytest.approx(theirs["lhs_exposed_s"])
    return ours


@pytest.mark.parametrize("text", ["by hand", "compiled here"])
def test_numbers_are_those_of_the_yardstick(text, yardstick):
    if text == "by hand":
        assert len(compare(PROGRAM, 4, yardstick, V5E, "TPU v5 lite")) == 3
        return
    # Not data=2, fsdp=2, tensor=2: of groups over a mesh in another order of devices the yardstick takes all devices.
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices()[:8])
    compiled = compile_run(
        Qwen(small_model()),
        next_token_prediction(),
        OptimizerConfig(1e-3),
        10,
        mesh,
        batch_size=8,
        columns=token_columns(16),
    )
    assert compare(compiled.as_text(), 8, yardstick, V5E, "TPU v5 lite")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_tpu_program_has_the_numbers_of_the_yardstick(tmp_path, yardstick, compiler_environment, root):
    done = subprocess.run(
        [
            sys.executable,
            "tools/compile_for_tpu.py",
            "--gin_file=gin/runs/pretrain_tiny.gin",
            "--gin_file=gin/hardware/v5e_16.gin",
            "--json",
            tmp_path / "a.json",
            "--hlo",
            tmp_path / "a.hlo",
            "--log",
            tmp_path / "a.log",
        ],
        capture_output=True,
        text=True,
        env=compiler_environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    text, log = (tmp_path / "a.hlo").read_text(), (tmp_path / "a.log").read_text(errors="replace")
    assert compare(text, 16, yardstick, V5E, "TPU v5 lite", log)
    report = json.loads((tmp_path / "a.json").read_text())
    memory = report["memory_bytes"]
    theirs = yardstick.parse_program_hbm(log) + memory["arguments"] + memory["outputs"] - memory["aliased"]
    assert report["memory_need_bytes"] == theirs and "log" in report["memory_source"]
