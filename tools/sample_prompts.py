"""Chooses prompts for annotation by their tags: diverse (many tags covered) and complex (many tags each).

    python tools/sample_prompts.py prompts.jsonl --count=1000 --output=runs/annotate.jsonl

Rows are JSON with `prompt` or `messages`, and `tags`, a list of names. The rows chosen are written as they are, in the
order of choice; beside them a table (`.md`) and a picture (`.png`) of what they cover, next to as many prompts drawn
whatever their tags. The choice depends on prompts, tags and `--seed`, not on the order of the files.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.data import prompt_sampling
from qwen_jax.data.prompt_sampling import Coverage, Pool, Tagged

logger = logging.getLogger(__name__)


def table(sets: Mapping[str, Sequence[Tagged]], pool: Pool) -> str:
    """A Markdown table of what each set covers, and of the rows that are left out."""
    whole = Coverage.of(pool.prompts)
    lines = [
        "| prompts | number | tags covered | tags a prompt | prompts of the rarest tag | of the most frequent |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, prompts in sets.items():
        one = Coverage.of(prompts)
        share = f"{one.tags:,} ({one.tags / whole.tags:.1%})"
        lines.append(f"| {name} | {one.prompts:,} | {share} | {one.mean_tags:.2f} | {one.least:,} | {one.most:,} |")
    rows = len(pool.prompts) + pool.left_out.total()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(pool.left_out.items())) or "none"
    lines += ["", f"{rows:,} rows read; left out: {reasons}."]
    return "\n".join(lines) + "\n"


def picture(sets: Mapping[str, Sequence[Tagged]], path: Path) -> None:
    """Tags covered as prompts are taken, and how many tags prompts have."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (covered, complexity) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    most = max(len(one.tags) for prompts in sets.values() for one in prompts)
    for number, (name, prompts) in enumerate(sets.items()):
        if name != "all":
            counts = prompt_sampling.covered_after(prompts)
            covered.plot(range(1, len(counts) + 1), counts, label=name, color=f"C{number}")
        sizes = np.bincount([len(one.tags) for one in prompts], minlength=most + 1)[1:]
        complexity.step(range(1, most + 1), sizes / len(prompts), where="mid", label=name, color=f"C{number}")
    covered.axhline(Coverage.of(sets["all"]).tags, color="black", linestyle="--", linewidth=1, label="all tags")
    covered.set_xlabel("prompts, in the order of choice")
    covered.set_ylabel("distinct tags")
    complexity.set_xlabel("tags of a prompt")
    complexity.set_ylabel("share of the prompts")
    for axes in (covered, complexity):
        axes.legend()
        axes.grid(alpha=0.3)
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Reads the pool, chooses, writes the rows and both reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", type=path_argument, help="files of JSON lines, or .json with an array")
    parser.add_argument("--count", type=int, required=True, help="number of prompts to choose")
    parser.add_argument("--output", type=path_argument, required=True, help="file of JSON lines to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for prompts of equal complexity (default: %(default)s)"
    )
    parser.add_argument(
        "--order",
        choices=prompt_sampling.ORDERS,
        default="complexity",
        help="in which prompts are visited: most tags first, as InsTag does, or at random (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    pool = prompt_sampling.read_pool(row for path in arguments.input for row in files.read_json_rows(path))
    logger.info("%s prompts to choose from", f"{len(pool.prompts):,}")
    chosen = prompt_sampling.sample(pool.prompts, arguments.count, seed=arguments.seed, order=arguments.order)
    sets = {
        "all": pool.prompts,
        "chosen": chosen,
        "drawn": prompt_sampling.draw(pool.prompts, arguments.count, arguments.seed),
    }
    text = table(sets, pool)
    files.write_text(arguments.output, "".join(files.json_line(one.row) for one in chosen))
    files.write_text(arguments.output.with_suffix(".md"), text)
    picture(sets, arguments.output.with_suffix(".png"))
    print(text, end="")
    beside = arguments.output.with_suffix("").name
    print(f"{len(chosen):,} prompts in {arguments.output}; {beside}.md and {beside}.png beside it say what they cover")


if __name__ == "__main__":
    run(main)
