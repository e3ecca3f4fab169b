"""PPO with one part of the recipe left out at a time, over several seeds: one table and one picture.

    python tools/ablate_rlhf.py --output=runs/rlhf/ablation

Runs gin/runs/ppo_tiny.gin (docs/how_to/rlhf.md makes what it begins with) for each variant and seed, in run folders
below the output. Started again, it goes on where it was stopped. Writes table.md and curves.png: the reward that the
policy is trained on (proxy), the gold reward, KL, and the perplexity on held-out pretraining text.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import command_line, files

FILES = ("gin/runs/ppo_tiny.gin", "gin/hardware/cpu.gin")
# Name to (what it leaves out, bindings).
VARIANTS = {
    "recipe": ("nothing", ()),
    "no_kl": ("the KL term", ("KL_COEFFICIENT=0.0",)),
    "no_pretraining": ("the pretraining gradient", ("PRETRAINING_COEFFICIENT=0.0",)),
    "no_warmup": ("the steps of the value model alone", ("POLICY_START_STEP=0",)),
    "one_response": ("the second response to a query", ("RESPONSES_PER_PROMPT=1",)),
    "top_p_1": ("the top-p filter", ("TOP_P=1.0",)),
}
# Metric to (its name in the table, its panel in the picture).
METRICS = {
    "rollout/reward": "proxy reward",
    "rollout/watched/gold": "gold reward",
    "rollout/kl": "KL, nats a response",
    "eval/perplexity": "pretraining perplexity",
}
# Rollouts at the end that figures of the table are the mean of.
LAST = 5


@dataclasses.dataclass(frozen=True)
class Curves:
    """One variant: metric to [(step, value of each seed), …]."""

    points: dict[str, list[tuple[int, list[float]]]]

    def last(self, metric: str) -> list[float]:
        """Mean of the last rollouts of each seed; of an evaluation, the last one."""
        rows = self.points[metric][-1:] if metric.startswith("eval/") else self.points[metric][-LAST:]
        return [statistics.fmean(values) for values in zip(*(values for _, values in rows), strict=True)]


def rows_of(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric of one run."""
    from qwen_jax.training.metrics import read_metrics

    return [(row["step"], row[metric]) for row in read_metrics(folder) if row.get(metric) is not None]


def curves_of(folders: list[Path]) -> Curves:
    """The curves of the runs of one variant, one for each seed."""
    points = {}
    for metric in METRICS:
        runs = [dict(rows_of(folder, metric)) for folder in folders]
        shared = sorted(set.intersection(*(set(run) for run in runs)))
        points[metric] = [(step, [run[step] for run in runs]) for step in shared]
    return Curves(points)


def train(folder: Path, seed: int, steps: int, bindings: list[str]) -> None:
    """One run to its end; does nothing where it has ended."""
    import gin

    from qwen_jax.configuration import load_gin
    from qwen_jax.distributed import hosts
    from qwen_jax.distributed.watchdog import join_job

    load_gin(FILES, [f"OUTPUT_DIR={folder}", f"SEED={seed}", f"TRAIN_STEPS={steps}", "EVAL_EVERY=16", *bindings])
    with join_job(hosts.JobConfig(num_processes=1), gin.config_str()) as watchdog:
        gin.get_configurable("rlhf")(watchdog=watchdog)


def spread(values: list[float]) -> str:
    """Mean over seeds, with the smallest and the largest."""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(found: dict[str, Curves]) -> str:
    """Markdown: a row for each variant, before and after training."""
    lines = ["| left out | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]
    first = next(iter(found.values())).points
    before = (f"{statistics.fmean(first[metric][0][1]):.2f}" for metric in METRICS)
    lines.append("| *before PPO* | " + " | ".join(before) + " |")
    for name, curves in found.items():
        lines.append(f"| {VARIANTS[name][0]} | " + " | ".join(spread(curves.last(metric)) for metric in METRICS) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Curves], path: Path) -> None:
    """A panel for each metric: mean over seeds against updates, with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for panel, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for name, curves in found.items():
            steps = [step for step, _ in curves.points[metric]]
            values = [seeds for _, seeds in curves.points[metric]]
            (line,) = panel.plot(steps, [statistics.fmean(v) for v in values], label=f"without {VARIANTS[name][0]}")
            panel.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], alpha=0.12, color=line.get_color()
            )
            if name == "recipe":
                line.set(label="the whole recipe", linewidth=2.5, color="black")
        panel.set(xlabel="updates", ylabel=label)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(argv=None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="example: python tools/ablate_rlhf.py --output=runs/rlhf/ablation"
    )
    parser.add_argument(
        "--output", type=command_line.path_argument, required=True, help="folder of runs, table, picture"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="updates of each run (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="gin binding of all runs")
    arguments = parser.parse_args(argv)

    import gin

    from qwen_jax.rlhf import rlhf
    from qwen_jax.train import train as plain_train

    gin.configurable(plain_train)
    gin.configurable(rlhf)
    folders = {name: [arguments.output / f"{name}_{s}" for s in range(arguments.seeds)] for name in arguments.variants}
    # Seed by seed, so that a table of fewer seeds is there early.
    found: dict[str, Curves] = {}
    for seed in range(arguments.seeds):
        for name, runs in folders.items():
            print(f"variant {name}, seed {seed}", flush=True)
            train(runs[seed], seed, arguments.steps, [*VARIANTS[name][1], *arguments.set])
        found = {name: curves_of(runs[: seed + 1]) for name, runs in folders.items()}
        files.write_text(arguments.output / "table.md", table(found))
        draw(found, arguments.output / "curves.png")
    print(table(found), end="")
    print(f"wrote {arguments.output / 'table.md'} and {arguments.output / 'curves.png'}")


if __name__ == "__main__":
    command_line.run(main)
