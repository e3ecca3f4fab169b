"""Time from a command to what a person waits for: the first training step, and the first generated token.

    python benchmarks/start.py                        # this tree
    python benchmarks/start.py --tree=../before       # another checkout, with its own .venv

Both use a prepared cache and a trained tiny model, which are made first if they are not there. Wall time of whole
processes, smallest and median of several runs one after the other on an idle machine; results in results/.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qwen_jax.command_line import path_argument

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("runs/start")


def settings(tree: Path) -> list[str]:
    """Arguments of `qwen_jax.train` for the tiny model in this checkout."""
    files = ["gin/runs/pretrain_tiny.gin"]
    if not (tree / files[0]).exists():
        files = ["gin/models/tiny.gin", "gin/runs/pretrain.gin"]
    # The same sizes in every checkout, whatever its tiny model is.
    sizes = {"hidden_size": 256, "num_layers": 4, "num_heads": 2, "head_dim": 128, "ffn_size": 688}
    return [
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.ModelConfig.{name}={value}" for name, value in sizes.items()),
        f"--gin.VOCABULARY={WORK / 'tiny.tiktoken'}",
        f"--gin.CACHE_DIR={WORK / 'cache'}",
        "--gin.LOG_EVERY=1",
    ]


def prepare(tree: Path, python: str) -> None:
    """Vocabulary, cache and a run with one checkpoint."""
    if (tree / WORK / "run" / "checkpoints").exists():
        return
    (tree / WORK).mkdir(parents=True, exist_ok=True)
    for command in (
        ["tools/build_tokenizer.py", "--size=4096", f"--output={WORK / 'tiny.tiktoken'}"],
        [
            "-m",
            "qwen_jax.train",
            *settings(tree),
            f"--gin.OUTPUT_DIR={WORK / 'run'}",
            "--gin.TRAIN_STEPS=2",
            "--gin.WARMUP_STEPS=1",
        ],
    ):
        subprocess.run([python, *command], cwd=tree, check=True, capture_output=True)


def first_step(tree: Path, python: str, number: int) -> float:
    """Seconds from the command until metrics.jsonl has the row of a step."""
    output = tree / WORK / f"first_step_{number}"
    subprocess.run(["rm", "-rf", output])
    began = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "qwen_jax.train", *settings(tree), f"--gin.OUTPUT_DIR={output}"],
        cwd=tree,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = output / "metrics.jsonl"
    while not (file.exists() and '"learning_rate"' in file.read_text()):
        if process.poll() is not None:
            raise SystemExit(f"error: training ended with exit code {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def first_token(tree: Path, python: str) -> float:
    """Seconds from the command until the first byte of a continuation."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "qwen_jax.generate", "--checkpoint", WORK / "run", "--prompt=def main(", "--max_new_tokens=8"],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if not process.stdout.read(1):
        raise SystemExit(f"error: generation ended with exit code {process.wait()}")
    seconds = time.perf_counter() - began
    process.communicate()
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Prints seconds of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=path_argument, default=ROOT, help="checkout to measure (default: this one)")
    parser.add_argument("--runs", type=int, default=5, help="of each (default: %(default)s)")
    arguments = parser.parse_args(argv)
    tree = arguments.tree.resolve()
    python = str(tree / ".venv" / "bin" / "python") if (tree / ".venv").exists() else sys.executable
    os.environ["PYTHONPATH"] = str(tree)
    prepare(tree, python)
    for name, measure in (
        ("first training step", lambda number: first_step(tree, python, number)),
        ("first generated token", lambda _: first_token(tree, python)),
    ):
        seconds = [measure(number) for number in range(arguments.runs)]
        print(f"{name:22} {min(seconds):6.2f} s at least, median {statistics.median(seconds):.2f} s", flush=True)


if __name__ == "__main__":
    main()
