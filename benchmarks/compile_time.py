"""Seconds to compile the train step of each model size for a pod, each in a fresh process with no cache.

    python benchmarks/compile_time.py --hardware=v5p_256 --output=runs/compile_time

Layers are scanned, so the time should not grow with them: the ratio of the largest model to the smallest is printed.
Needs libtpu. Reports of tools/compile_for_tpu.py are kept in --output as MODEL_HARDWARE.json; --gin.NAME=VALUE is
handed on to it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from qwen_jax.command_line import path_argument, run

ROOT = Path(__file__).resolve().parent.parent
PHASES = {"trace": "tracing", "lower": "lowering", "xla": "XLA"}


def measure(model: str, hardware: str, output: Path, flags: list[str]) -> dict:
    """Compiles one model.

    Returns:
      "wall" and "cpu" seconds of the process, "step" seconds of compiling alone, and seconds by phase of it.

    Raises:
      ValueError: it does not compile, or its state alone does not fit.
    """
    report = output / f"{model}_{hardware}.json"
    report.unlink(missing_ok=True)
    files = [f"--gin_file=gin/{file}.gin" for file in (f"runs/pretrain_{model}", f"hardware/{hardware}")]
    command = [sys.executable, "tools/compile_for_tpu.py", *files, *flags, "--json", str(report.absolute())]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if not report.exists():
        message = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        raise ValueError(f"{model} for {hardware}: {message.removeprefix('error: ')}")
    found = json.loads(report.read_text())
    if "compile_seconds" not in found:
        raise ValueError(f"{model} for {hardware}: {found['message']}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall": wall,
        "cpu": cpu,
        "step": found["compile_seconds"],
        "parameters": found.get("parameters", 0),
        **found.get("compile_phases_seconds", {}),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="v5p_256", help="file of gin/hardware (default v5p_256)")
    parser.add_argument(
        "--models", default="1_8b,7b,14b", help="sizes of gin/runs/pretrain_SIZE.gin, smallest first (1_8b,7b,14b)"
    )
    parser.add_argument("--output", type=path_argument, default=Path("runs/compile_time"), help="folder of the reports")
    arguments, flags = parser.parse_known_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for model in arguments.models.split(","):
        rows[model] = measure(model, arguments.hardware, arguments.output, flags)
        print(f"{model}: {rows[model]['step']:.0f} s", file=sys.stderr, flush=True)
    print(f"| {arguments.hardware} | compiling, s | of it {', '.join(PHASES.values())} | process: wall, s | CPU, s |")
    print("|---|--:|--:|--:|--:|")
    for model, row in rows.items():
        phases = ", ".join(f"{row.get(phase, 0):.1f}" for phase in PHASES)
        print(f"| {model} | {row['step']:.1f} | {phases} | {row['wall']:.1f} | {row['cpu']:.1f} |")
    first, last = list(rows)[0], list(rows)[-1]
    ratios = [rows[last][key] / rows[first][key] for key in ("step", "cpu")]
    print(f"\n{last} / {first}: {ratios[0]:.2f} (CPU seconds {ratios[1]:.2f})")


if __name__ == "__main__":
    run(main)
