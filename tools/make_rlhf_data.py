"""Writes a small world in which all of RLHF can be tried: text, conversations, comparisons and prompts.

    python tools/make_rlhf_data.py --output=runs/rlhf/data

Sentences come from a grammar of animals. The *gold* preference is known: an answer should have three of the words
`kindly`, `gently` and `gladly`; fewer and more are worse (`match_count` of qwen_jax/alignment/rewards.py). Answers of
the comparisons have at most four of them, mostly fewer than three, so a reward model learns that more is better: a
*proxy* that a policy can over-optimize. docs/how_to/rlhf.md goes on from here.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

import task_arguments  # noqa: F401  makes the repository importable

from qwen_jax import command_line, files
from qwen_jax.data.chatml import DEFAULT_SYSTEM

ANIMALS = """cat dog fox owl hen bear wolf duck goat frog horse mouse sheep otter raven swan crow deer seal crab
tiger lion zebra camel moose eagle robin finch trout snail""".split()
VERBS = "runs sleeps sings waits plays swims eats hides jumps rests".split()
PLACES = ["in the barn", "by the river", "on the hill", "under a tree", "near the road", "in the snow", "at night"]
KIND = ["kindly", "gently", "gladly"]
PLAIN = ["slowly", "quickly", "often", "rarely", "quietly", "loudly"]
QUESTIONS = [
    "Tell me about the {}.",
    "What does the {} do?",
    "Describe the {}.",
    "Where is the {}?",
    "Say more of the {}.",
]
PATTERN = r"\b(?:kindly|gently|gladly)\b"


def sentence(chance: random.Random, animal: str, kind: float) -> str:
    """One sentence about an animal; with probability `kind` its adverb is a kind one."""
    adverb = chance.choice(KIND) if chance.random() < kind else chance.choice([*PLAIN, *[""] * 6])
    words = ["the", animal, *([adverb] if adverb else []), chance.choice(VERBS), chance.choice(PLACES)]
    return " ".join(words).capitalize() + "."


def answer(chance: random.Random, animal: str, kind: float) -> str:
    """An answer of two to four sentences."""
    return " ".join(sentence(chance, animal, kind) for _ in range(chance.randint(2, 4)))


def gold(text: str) -> int:
    """Number of kind words away from the best, three."""
    return abs(len(re.findall(PATTERN, text)) - 3)


def comparison(chance: random.Random, noise: float) -> dict:
    """Two answers to one question, the better one by the gold preference first, now and then the other."""
    while True:
        animal, question = chance.choice(ANIMALS), chance.choice(QUESTIONS)
        first, second = (answer(chance, animal, 0.35) for _ in range(2))
        if gold(first) != gold(second):
            break
    chosen, rejected = sorted((first, second), key=gold)
    if chance.random() < noise:
        chosen, rejected = rejected, chosen
    return {"prompt": question.format(animal), "chosen": chosen, "rejected": rejected}


def conversation(chance: random.Random) -> dict:
    """A question and an answer with few kind words."""
    animal = chance.choice(ANIMALS)
    turns = (("user", chance.choice(QUESTIONS).format(animal)), ("assistant", answer(chance, animal, 0.1)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def document(chance: random.Random) -> dict:
    """Text for pretraining, about several animals; now and then a transcript, so that the vocabulary has its words."""
    if chance.random() < 0.2:
        turns = (turn["content"] for turn in conversation(chance)["messages"])
        return {"text": "\n".join(["system", DEFAULT_SYSTEM, "user", next(turns), "assistant", next(turns)])}
    sentences = (sentence(chance, chance.choice(ANIMALS), 0.1) for _ in range(chance.randint(6, 12)))
    return {"text": " ".join(sentences)}


def write(path: Path, rows: Iterable[dict]) -> None:
    """Writes JSON lines, and says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_text(path, text)
    print(f"{text.count(chr(10)):,} rows in {path}")


def main(argv=None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="example: python tools/make_rlhf_data.py --output=runs/rlhf/data"
    )
    parser.add_argument("--output", type=command_line.path_argument, required=True, help="folder of the four files")
    parser.add_argument("--rows", type=int, default=2000, help="rows of each file (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.05, help="share of wrong comparisons (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all files (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    chance = random.Random(arguments.seed)
    asked = [question.format(animal) for question in QUESTIONS for animal in ANIMALS]
    made = {
        "text": (document(chance) for _ in range(arguments.rows)),
        "conversations": (conversation(chance) for _ in range(arguments.rows)),
        "comparisons": (comparison(chance, arguments.noise) for _ in range(arguments.rows)),
        "prompts": ({"prompt": prompt} for prompt in chance.sample(asked, len(asked))),
    }
    for name, rows in made.items():
        write(arguments.output / f"{name}.jsonl", rows)


if __name__ == "__main__":
    command_line.run(main)
