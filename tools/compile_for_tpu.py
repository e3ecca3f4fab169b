"""Compiles the train step of a run for a TPU pod, on a machine without one, and says what it needs.

    python tools/compile_for_tpu.py --gin_file=gin/models/7b.gin --gin_file=gin/runs/pretrain.gin \\
        --gin_file=gin/hardware/v5p_256.gin

It is the step that `python -m qwen_jax.train` runs with the same files. Nothing is allocated; it takes about two
minutes and 3 GB of memory. Needs libtpu (`pip install -c requirements.txt "jax[tpu]"`). Exit code 1: it does not fit.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import gin  # noqa: E402

from qwen_jax import train  # noqa: E402
from qwen_jax.command_line import run  # noqa: E402
from qwen_jax.configuration import parse_args  # noqa: E402
from qwen_jax.hardware import GIB, HardwareConfig  # noqa: E402
from qwen_jax.models.transformer import Qwen, parameter_count  # noqa: E402
from qwen_jax.programs.account import collectives_per_device  # noqa: E402
from qwen_jax.sharding import make_mesh  # noqa: E402
from qwen_jax.training.program import compile_run, memory_per_device, model_flops_per_token  # noqa: E402


def compile_program(settings: dict, hardware: HardwareConfig):
    """Compiles the step of the run that `settings` (bindings of `train`) describe; returns (compiled, report)."""
    model, loop = settings["model"], settings["loop"]
    mesh = make_mesh(settings["mesh"], hardware.devices())
    began = time.perf_counter()
    compiled = compile_run(
        Qwen(model), settings["objective"], settings["optimizer"], loop.train_steps, mesh, batch_size=loop.batch_size,
        sequence_length=loop.sequence_length, accumulation=loop.accumulation_steps, seed=loop.seed,
    )
    seconds = time.perf_counter() - began
    tokens = loop.batch_size * loop.sequence_length
    causal = model_flops_per_token(model, loop.sequence_length)
    conventional = model_flops_per_token(model, loop.sequence_length, causal=False)
    memory = memory_per_device(compiled)
    return compiled, {
        "topology": hardware.topology, "slices": hardware.slices, "devices": mesh.size, "mesh": dict(mesh.shape),
        "parameters": parameter_count(model), "tokens_per_step": tokens, "compile_seconds": seconds,
        "memory_bytes_per_device": memory, "memory_limit_bytes": int(hardware.hbm_gib * GIB),
        "fits": memory["need"] <= hardware.hbm_gib * GIB,
        "model_flops_per_token": causal.total, "model_flops_per_token_all_keys": conventional.total,
        "model_flops_per_device": causal.total * tokens / mesh.size,
        "seconds_at_peak": causal.total * tokens / mesh.size / (hardware.peak_tflops * 1e12),
        "collectives_per_device": {
            kind: dataclasses.asdict(total) for kind, total in collectives_per_device(compiled.as_text()).items()
        },
        # What sharding over fsdp cannot do without: each parameter gathered in bfloat16 for the forward and for the
        # backward pass, and each gradient reduced once.
        "least_gather_bytes": 2 * 2 * parameter_count(model), "least_reduce_bytes": 2 * parameter_count(model),
    }


def describe(report: dict) -> str:
    """The report as lines for a person."""
    memory = report["memory_bytes_per_device"]
    limit = report["memory_limit_bytes"]
    lines = [
        f"{report['parameters']:,} parameters on {report['devices']} devices ({report['topology']}), mesh "
        f"{report['mesh']}, {report['tokens_per_step']:,} tokens a step; compiled in {report['compile_seconds']:.0f} s",
        f"memory per device   need {memory['need'] / GIB:.2f} of {limit / GIB:.2f} GiB "
        f"(arguments {memory['arguments'] / GIB:.2f}, all but {(memory['outputs'] - memory['aliased']) / GIB:.2f} of "
        f"the outputs aliased, temporaries {memory['temporaries'] / GIB:.2f}): "
        + ("fits" if report["fits"] else "DOES NOT FIT"),
        f"model operations    {report['model_flops_per_token'] / 1e9:.2f} GFLOP per token "
        f"({report['model_flops_per_token_all_keys'] / 1e9:.2f} by the convention that counts masked keys), "
        f"{report['model_flops_per_device'] / 1e12:.0f} TFLOP per device: {report['seconds_at_peak']:.2f} s at peak",
        "collectives         per device and step:",
    ]
    for kind, total in sorted(report["collectives_per_device"].items()):
        lines.append(f"  {kind:<20}{total['count']:>6} of {total['payload_bytes'] / GIB:8.2f} GiB in all")
    lines.append(
        f"  least for the layout: {report['least_gather_bytes'] / GIB:.2f} GiB gathered, "
        f"{report['least_reduce_bytes'] / GIB:.2f} GiB reduced"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument("--hlo", type=Path, help="write the text of the compiled program there")
    gin.configurable(train.train)
    # A run must say where it goes; a compilation goes nowhere.
    arguments = parse_args(parser, [*(argv if argv is not None else sys.argv[1:]), "--gin.OUTPUT_DIR=none"])
    settings = gin.get_bindings("train")
    compiled, report = compile_program(settings, gin.get_configurable("HardwareConfig")())
    print(describe(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.hlo:
        arguments.hlo.write_text(compiled.as_text())
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    run(main)
