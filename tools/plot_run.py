"""Draws the loss curves of one or more runs, and the shares of their time, as a PNG.

python tools/plot_run.py runs/tiny
python tools/plot_run.py runs/tiny runs/other --output comparison.png
"""

import argparse
from pathlib import Path

import matplotlib

from qwen_jax import files

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from qwen_jax.command_line import path_argument, run
from qwen_jax.training.goodput import written_shares
from qwen_jax.training.metrics import METRICS_FILE, read_metrics


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the start."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_accounts(panel: plt.Axes, accounts: list[tuple[str, dict[str, float]]]) -> None:
    """Draws one bar for each run, split by the causes of its time.

    Args:
      accounts: the name of each run and the shares of its time by cause.
    """
    causes = list(dict.fromkeys(cause for _, shares in accounts for cause in shares))
    starts = np.zeros(len(accounts))
    for index, cause in enumerate(causes):
        widths = np.array([shares.get(cause, 0.0) for _, shares in accounts])
        panel.barh(range(len(accounts)), widths, left=starts, color=plt.get_cmap("tab20")(index % 20), label=cause)
        starts += widths
    for index, (name, shares) in enumerate(accounts):
        text = f"{name}: goodput {shares['steps']:.1%}"
        panel.text(0.01, index, text, va="center", fontsize="small", bbox={"facecolor": "white", "pad": 2})
    panel.set_yticks([])
    panel.set_xlim(0, 1)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.set_xlabel("time since the first start")
    panel.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(accounts) - 0.2), fontsize="small")


def _at_the_end(row: dict) -> str:
    """The figure of a held-out evaluation for the legend; only text has bits per byte."""
    bits = row.get("eval/bits_per_byte")
    return f"{row['eval/loss']:.3f}" if bits is None else f"{bits:.3f} bits per byte"


def compose(runs: list[Path]) -> plt.Figure:
    """Draws training loss (thin: as logged, thick: smoothed) and held-out loss above, learning rate and speed below.

    Runs that keep an account of their time get a bar of it each, at the bottom.

    Raises:
      ValueError: a run has no metrics yet.
    """
    accounts = [(folder.name, shares) for folder in runs if (shares := written_shares(folder)) is not None]
    heights = [4.8, 1.7] + [0.3 + 0.25 * len(accounts)] * bool(accounts)
    figure, (losses, rates, *below) = plt.subplots(
        len(heights),
        1,
        figsize=(9, sum(heights) + 0.5 + bool(accounts)),
        height_ratios=heights,
        layout="constrained",
    )
    rates.sharex(losses)
    losses.tick_params(labelbottom=False)
    for panel in below:
        draw_accounts(panel, accounts)
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
                [row["step"] for row in held_out],
                [row["eval/loss"] for row in held_out],
                "o--",
                color=color,
                markeredgecolor="black",
                label=f"{name}: held out, {_at_the_end(held_out[-1])} at the end",
            )
        rates.plot(steps, [row["learning_rate"] for row in train], color=color)
        # The row of an update that ended a run has no pace.
        speeds.plot(steps, [row.get("tokens_per_second") or np.nan for row in train], ":", color=color)
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    losses.grid(alpha=0.3)
    rates.set_ylabel("learning rate (solid)")
    speeds.set_ylabel("tokens per second (dotted)")
    speeds.set_ylim(bottom=0)
    rates.set_xlabel("updates")
    return figure


def draw(runs: list[Path], output: Path) -> None:
    """Writes the figure of `compose` to a PNG."""
    figure = compose(runs)
    with files.new_file(output) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=path_argument, help="OUTPUT_DIR of each run")
    parser.add_argument(
        "--output", type=path_argument, help="PNG to write (default: loss.png in the first run's folder)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.runs[0] / "loss.png"
    draw(arguments.runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
