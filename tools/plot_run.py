"""Draws the loss curves of one or more runs as a PNG.

    python tools/plot_run.py runs/tiny
    python tools/plot_run.py runs/tiny runs/other --output comparison.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from qwen_jax.command_line import run  # noqa: E402
from qwen_jax.training.metrics import METRICS_FILE, read_metrics  # noqa: E402


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the start."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: list[Path], output: Path) -> None:
    """Draws training loss (thin: as logged, thick: smoothed) and held-out loss above, learning rate and speed below.

    Raises:
      ValueError: a run has no metrics yet.
    """
    figure, (losses, rates) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    speeds = rates.twinx()
    for index, folder in enumerate(runs):
        rows = read_metrics(folder)
        train = [row for row in rows if row.get("loss") is not None]
        held_out = [row for row in rows if row.get("eval/loss") is not None]
        if not train:
            raise ValueError(f"{folder}/{METRICS_FILE} has no training loss yet: name the OUTPUT_DIR of a run")
        color, name = f"C{index}", folder.name
        steps = np.array([row["step"] for row in train])
        loss = np.array([row["loss"] for row in train])
        losses.plot(steps, loss, color=color, alpha=0.3, linewidth=0.8)
        losses.plot(steps, smoothed(loss, max(1, len(loss) // 30)), color=color, label=f"{name}: training")
        if held_out:
            losses.plot(
                [row["step"] for row in held_out], [row["eval/loss"] for row in held_out], "o--", color=color,
                markeredgecolor="black",
                label=f"{name}: held out, {held_out[-1]['eval/bits_per_byte']:.3f} bits per byte at the end",
            )
        rates.plot(steps, [row["learning_rate"] for row in train], color=color)
        speeds.plot(steps, [row["tokens_per_second"] for row in train], ":", color=color)
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    losses.grid(alpha=0.3)
    rates.set_ylabel("learning rate (solid)")
    speeds.set_ylabel("tokens per second (dotted)")
    speeds.set_ylim(bottom=0)
    rates.set_xlabel("updates")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(output)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="OUTPUT_DIR of each run")
    parser.add_argument("--output", type=Path, help="PNG to write (default: loss.png in the first run's folder)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.runs[0] / "loss.png"
    draw(arguments.runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
