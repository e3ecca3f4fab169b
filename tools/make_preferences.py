"""Writes comparisons, prompts and conversations of a world whose reward is known (qwen_jax/alignment/courtesy.py).

python tools/make_preferences.py --output runs/courtesy

  pretraining.jsonl    comparisons for preference model pretraining, some with the wrong label: prompt, chosen, rejected
  pairs.jsonl          fewer comparisons with the right labels, for the reward model and for DPO
  held_out.jsonl       comparisons with guests that none of the other files names
  prompts.jsonl        the prompts alone, for reinforcement learning
  conversations.jsonl  one conversation a line, from rude to courteous, for supervised fine-tuning
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from qwen_jax import files
from qwen_jax.alignment import courtesy
from qwen_jax.command_line import path_argument, run


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Writes one JSON object a line."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def comparisons(count: int, noise: float, draw: random.Random, held_out: bool) -> list[dict]:
    """Rows of `count` comparisons."""
    prompts = courtesy.prompts(held_out)
    pairs = (courtesy.pair(draw.choice(prompts), draw, noise) for _ in range(count))
    return [{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--pretraining", type=int, default=4000, help="comparisons for pretraining (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=1000, help="comparisons for fine-tuning (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=500, help="held-out comparisons (default: %(default)s)")
    parser.add_argument("--conversations", type=int, default=500, help="conversations (default: %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.25, help="share of wrong labels in pretraining.jsonl (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for all random choices (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.noise < 0.5:
        parser.error(f"--noise must be in [0, 0.5), found {args.noise}")
    draw = random.Random(args.seed)
    prompts = courtesy.prompts()
    talks = []
    for _ in range(args.conversations):
        prompt = draw.choice(prompts)
        said = {"role": "assistant", "content": courtesy.response(prompt, draw)}
        talks.append({"messages": [{"role": "user", "content": prompt}, said]})
    rows = {
        "pretraining.jsonl": comparisons(args.pretraining, args.noise, draw, held_out=False),
        "pairs.jsonl": comparisons(args.pairs, 0.0, draw, held_out=False),
        "held_out.jsonl": comparisons(args.held_out, 0.0, draw, held_out=True),
        "prompts.jsonl": [{"prompt": prompt} for prompt in prompts],
        "conversations.jsonl": talks,
    }
    for name, lines in rows.items():
        write_lines(args.output / name, lines)
        print(f"{args.output / name}: {len(lines):,} lines")


if __name__ == "__main__":
    run(main)
