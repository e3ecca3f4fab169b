"""Ranks models by the verdicts of annotators: win, tie and loss, Elo, Bradley-Terry, agreement.

The way to verdicts is docs/how_to/compare_models.md.

python tools/rank_models.py runs/compare/verdicts_*.jsonl --reference base --output runs/compare/ranking
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.evaluation import preferences
from qwen_jax.evaluation.preferences import Comparison, Strength

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = {"win": "#4c9f70", "tie": "#d9d9d9", "loss": "#c85a54"}


def outcome_table(outcomes: Mapping[str, tuple[int, int, int]], reference: str) -> str:
    """Markdown of wins, ties and losses against the reference."""
    lines = [f"| against {reference} | win | tie | loss | comparisons |", "|---|---|---|---|---|"]
    for model, counts in outcomes.items():
        total = sum(counts)
        shares = " | ".join(f"{count} ({count / total:.1%})" for count in counts)
        lines.append(f"| {model} | {shares} | {total} |")
    return "\n".join(lines)


def rating_table(elo: Mapping[str, tuple[float, float]], strengths: Mapping[str, Strength]) -> str:
    """Markdown of both ratings, best Bradley-Terry rating first."""
    lines = ["| model | Elo | ± order | Bradley-Terry | 95% interval |", "|---|---|---|---|---|"]
    for model, one in strengths.items():
        mark = "\\*" * one.unbounded
        lines.append(
            f"| {model} | {elo[model][0]:.0f} | {elo[model][1]:.1f} | {one.rating:.0f}{mark} | "
            f"{one.low:.0f} to {one.high:.0f} |"
        )
    if any(one.unbounded for one in strengths.values()):
        lines.append("\n\\* never lost or never won: without the prior its rating is infinite")
    return "\n".join(lines)


def agreement_table(found: preferences.Agreement) -> str:
    """Markdown of the agreement of each two annotators, and of all."""

    def shown(kappa: float | None) -> str:
        return "–" if kappa is None else f"{kappa:.2f}"

    lines = ["| annotators | items | same verdict | Cohen's kappa |", "|---|---|---|---|"]
    for (first, second), (items, share, kappa) in found.pairs.items():
        lines.append(f"| {first}, {second} | {items} | {share:.1%} | {shown(kappa)} |")
    lines.append(f"\nFleiss' kappa of all annotators, on the {found.items} items that all judged: {shown(found.kappa)}")
    return "\n".join(lines)


def draw(
    outcomes: Mapping[str, tuple[int, int, int]], reference: str, strengths: Mapping[str, Strength], output: Path
) -> None:
    """Writes a PNG: bars of win, tie and loss as in Figure 4 of the report, and ratings with their intervals below."""
    height = 0.5 * (len(outcomes) + len(strengths)) + 2.2
    figure, (bars, points) = plt.subplots(
        2, 1, figsize=(8, height), height_ratios=[len(outcomes) + 1, len(strengths) + 1], layout="constrained"
    )
    for row, counts in enumerate(outcomes.values()):
        start, total = 0.0, sum(counts)
        for (name, color), count in zip(COLORS.items(), counts, strict=True):
            width = count / total
            bars.barh(row, width, left=start, color=color, label=name if row == 0 else None)
            if width > 0.04:
                bars.text(start + width / 2, row, f"{width:.0%}", ha="center", va="center", fontsize="small")
            start += width
    bars.set_yticks(range(len(outcomes)), list(outcomes))
    bars.set_xlim(0, 1)
    bars.set_xticks([])
    bars.set_title(f"against {reference}", fontsize="medium")
    bars.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize="small")
    for row, one in enumerate(strengths.values()):
        points.plot([one.low, one.high], [row, row], color="gray")
        points.plot(one.rating, row, "o", color="black")
    points.set_yticks(range(len(strengths)), list(strengths))
    points.set_xlabel("Bradley-Terry rating, 95% interval")
    points.grid(axis="x", alpha=0.3)
    for panel in (bars, points):
        panel.invert_yaxis()
    with files.new_file(output) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def report(comparisons: list[Comparison], arguments: argparse.Namespace) -> str:
    """Markdown of everything; writes the picture."""
    reference = arguments.reference or preferences.models_of(comparisons)[0]
    counted = preferences.majority(comparisons) if arguments.majority else comparisons
    outcomes = preferences.against(counted, reference)
    elo = preferences.elo(counted, step=arguments.elo_step, shuffles=arguments.shuffles, seed=arguments.seed)
    strengths = preferences.strengths(counted, prior=arguments.prior, samples=arguments.samples, seed=arguments.seed)
    draw(outcomes, reference, strengths, arguments.output / "ranking.png")
    people = sorted({one.annotator for one in comparisons})
    instructions = {one.instruction for one in comparisons}
    parts = [
        f"{len(comparisons)} comparisons of {len(elo)} models on {len(instructions)} instructions by {len(people)} "
        f"annotator(s): {', '.join(people)}",
        outcome_table(outcomes, reference),
        rating_table(elo, strengths),
        agreement_table(preferences.agreement(comparisons)) if len(people) > 1 else "One annotator: no agreement.",
    ]
    if arguments.majority:
        parts.insert(1, "Counted is the verdict of the majority on each instruction and two models, otherwise a tie.")
    if (share := preferences.left_share(comparisons)) is not None:
        parts.append(f"The answer on the left won {share:.1%} of the comparisons without a tie.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "verdicts",
        nargs="+",
        type=path_argument,
        help="JSON lines of verdicts; format: qwen_jax/evaluation/preferences.py",
    )
    parser.add_argument("--reference", help="model that the others are held against (default: the first by name)")
    parser.add_argument(
        "--output", type=path_argument, required=True, metavar="FOLDER", help="gets ranking.md and ranking.png"
    )
    parser.add_argument("--majority", action="store_true", help="count one verdict for each item: that of the majority")
    parser.add_argument("--elo_step", type=float, default=preferences.ELO_STEP, help="K of Elo (default: %(default)s)")
    parser.add_argument(
        "--shuffles", type=int, default=200, help="orders that Elo is averaged over (default: %(default)s)"
    )
    parser.add_argument(
        "--prior",
        type=float,
        default=0.01,
        help="of Bradley-Terry, on squared strengths; 0: none (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for orders and resamples")
    arguments = parser.parse_args(argv)
    comparisons = preferences.read_comparisons(arguments.verdicts)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = report(comparisons, arguments)
    files.write_text(arguments.output / "ranking.md", text)
    print(text)
    print(f"wrote {arguments.output / 'ranking.md'} and {arguments.output / 'ranking.png'}")


if __name__ == "__main__":
    run(main)
