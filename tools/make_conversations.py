"""Writes conversations made by rules, in which every answer has one format, for a model for a laptop to learn.

python tools/make_conversations.py --output runs/sft

The words are names of modules of Python's standard library, which the demo's base model has read. Questions are of a
few kinds, and every answer is `Answer: WORD.`, so that the format, the end of an answer and its content can be counted.
No question of `held_out.jsonl` is asked in `train.jsonl`; its word is, in questions of other kinds.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from qwen_jax import files
from qwen_jax.command_line import path_argument, run

# The answer is the word for {word}.
QUESTIONS = (
    "Which module does this line import? import {word}",
    "Which module is used here? {word}.open(path)",
    "Repeat this name: {word}",
    "What is between the brackets? [{word}]",
)
FORMAT = "Answer: {word}."


def messages(word: str, question: str) -> list[dict[str, str]]:
    """A question and its answer."""
    return [
        {"role": "user", "content": question.format(word=word)},
        {"role": "assistant", "content": FORMAT.format(word=word)},
    ]


def write(folder: Path, count: int, held_out: int, seed: int) -> None:
    """Writes both files.

    Args:
      folder: made if missing.
      count: conversations in train.jsonl, of one or two questions; held_out: questions in held_out.jsonl.

    Raises:
      ValueError: `held_out` is too many.
    """
    draw = random.Random(seed)
    words = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    asked = [(word, question) for word in words for question in QUESTIONS]
    draw.shuffle(asked)
    if not 1 <= held_out <= len(asked) // 2:
        raise ValueError(f"--held_out must be from 1 to {len(asked) // 2}, half of all questions; found {held_out}")
    kept = asked[held_out:]
    train = [sum((messages(*one) for one in draw.sample(kept, draw.choice((1, 1, 2)))), []) for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in (("train.jsonl", train), ("held_out.jsonl", [messages(*one) for one in asked[:held_out]])):
        files.write_text(folder / name, "".join(json.dumps({"messages": one}) + "\n" for one in made))
        print(f"wrote {folder / name}: {len(made)} conversations")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="folder for both files")
    parser.add_argument("--count", type=int, default=3000, help="conversations to train on (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=200, help="held-out questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for words and questions")
    arguments = parser.parse_args(argv)
    write(arguments.output, arguments.count, arguments.held_out, arguments.seed)


if __name__ == "__main__":
    run(main)
