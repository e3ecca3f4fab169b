"""Asks a model questions about pictures, and counts by kind what it answers rightly.

    python tools/measure_vision.py --checkpoint runs/vision/stage3 --output runs/vision/measured/stage3 \\
        --questions runs/vision/data/held_out/questions.jsonl

Questions are JSON lines as `tools/make_pictures.py` writes them: `messages` with a last one of the assistant, which is
the reference, and perhaps a `kind` to count by. An answer is right if it is equal to the reference; where the reference
has a box, if the box overlaps it by more than half (intersection over union); of a comparison the verdict counts, the
words after its last colon. Answers are greedy. --output gets answers.jsonl and scores.json.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from picture_words import GRID
from tqdm import tqdm

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import files
from qwen_jax.command_line import path_argument, quick_imports, run

with quick_imports():
    import numpy as np

    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.data import chatml, content
    from qwen_jax.data.conversations import read_parts
    from qwen_jax.data.images import open_image, squash
    from qwen_jax.evaluation.vision.grounding import iou, read_box
    from qwen_jax.generate import load_engine
    from qwen_jax.inference import Engine, Request

OVERLAP = 0.5


def right(kind: str, answer: str, reference: str) -> bool:
    """Whether an answer is right; see the module."""
    if expected := read_box(reference):
        found = read_box(answer)
        return found is not None and iou(found, expected) > OVERLAP
    if kind == "compare":
        answer, reference = (re.split("[:：]", text)[-1] for text in (answer, reference))
    return answer.strip() == reference.strip()


def read_questions(path: Path) -> list[dict]:
    """Questions: `kind`, `asked` (role and parts of each message), `reference` and `images` (paths).

    Raises:
      OSError: no such file, or a picture is missing.
      ValueError: a line has no such messages; the message has file and line.
    """
    found = []
    for where, row in files.read_json_lines(path):
        messages = row.get("messages") if isinstance(row, dict) else None
        fields = {"role", "content"}
        whole = isinstance(messages, list) and all(isinstance(one, dict) and fields <= one.keys() for one in messages)
        if not isinstance(row, dict) or not messages or not whole or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: expected messages, the last one of the assistant")
        asked = [
            {"role": one["role"], "content": read_parts(one["content"], f"{where}, message {index}")}
            for index, one in enumerate(messages)
        ]
        images = [path.parent / str(one.image) for message in asked for one in content.pictures(message["content"])]
        if missing := [image for image in images if not image.is_file()]:
            raise FileNotFoundError(f"{where}: no picture {missing[0]}; paths are relative to the folder of {path}")
        reference = content.written(asked.pop()["content"])
        found.append({"kind": row.get("kind", "all"), "asked": asked, "reference": reference, "images": images})
    if not found:
        raise ValueError(f"{path} has no questions")
    return found


def prompt(tokenizer, kind: str, asked: Sequence[dict], num_queries: int, plain: bool) -> list[int]:
    """Token ids of a question.

    Args:
      kind: of the question.
      plain: the prompts of stage 1 and of visual questions (`qwen_jax.data.vision`) without turns, as for a model that
        knows none.
    """
    if not plain:
        labelled = content.with_labels([message["content"] for message in asked])
        turns = [message | {"content": said} for message, said in zip(asked, labelled, strict=True)]
        return chatml.encode_prompt(tokenizer, turns, num_queries=num_queries)
    parts = [part for message in asked for part in message["content"]]
    seen = content.pictures(parts)
    words = [part for part in parts if part not in seen]
    if kind == "cells":
        words = [f"Generate the caption in {GRID}:"]
    elif kind == "describe":
        chinese = any("\u4e00" <= letter for word in words for letter in content.written([word]))
        words = [f"Generate the caption in {'Chinese' if chinese else 'English'}:"]
    else:
        words.append(" Answer:")
    return content.encode(tokenizer, [*seen, *words], num_queries)


def ask(
    engine: Engine, questions: Sequence[dict], *, plain: bool = False, blank: bool = False, max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers, in the order of the questions, whose pictures are read when it is their turn.

    Args:
      plain: see `prompt`.
      blank: gray pictures instead of those of the questions, which shows what is known without looking.

    Raises:
      ValueError, OSError: the model has no image encoder, or a picture cannot be read; the message has its path.
    """
    tokenizer, vision = engine.tokenizer, engine.model.config.vision
    if vision is None:
        raise ValueError("the checkpoint has no image encoder: name one of a Qwen-VL")

    def requests() -> Iterator[Request]:
        for one in questions:
            pictures = [squash(open_image(path), vision.image_size) for path in one["images"]]
            pictures = [np.full_like(picture, 128) for picture in pictures] if blank else pictures
            ids = prompt(tokenizer, one["kind"], one["asked"], vision.num_queries, plain)
            yield Request(ids, max_new_tokens, stop_ids=chatml.stop_ids(tokenizer), images=pictures)

    answers = [""] * len(questions)
    for result in tqdm(engine.generate(requests()), total=len(questions), unit="answer"):
        answers[result.index] = (result.text or "").strip().split("\n")[0]
    return answers


def scores(questions: Sequence[dict], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each kind `count` and `right`, a share."""
    found: dict[str, list[bool]] = {}
    for one, answer in zip(questions, answers, strict=True):
        found.setdefault(one["kind"], []).append(right(one["kind"], answer, one["reference"]))
    return {kind: {"count": len(held), "right": sum(held) / len(held)} for kind, held in found.items()}


def write(folder: Path, questions: Sequence[dict], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Writes answers.jsonl and scores.json; returns the scores."""
    found = scores(questions, answers)
    lines = [
        {
            "kind": one["kind"],
            "images": [str(path.resolve()) for path in one["images"]],
            "question": "".join(content.written(message["content"]) for message in one["asked"]),
            "answer": answer,
            "reference": one["reference"],
            "right": right(one["kind"], answer, one["reference"]),
        }
        for one, answer in zip(questions, answers, strict=True)
    ]
    texts = "".join(map(files.json_line, lines))
    files.write_text(folder / "answers.jsonl", texts)
    files.write_json(folder / "scores.json", {"kinds": found})
    return found


@programs_kept()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="run folder, or converted folder")
    parser.add_argument("--questions", type=path_argument, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="for the two files")
    parser.add_argument("--plain", action="store_true", help="no turns of ChatML: for stages before they are learned")
    parser.add_argument("--blank", action="store_true", help="show gray pictures: what is known without looking")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="limit of an answer (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=32, help="answers in one batch (default: %(default)s)")
    arguments = parser.parse_args(argv)
    questions = read_questions(arguments.questions)
    engine = load_engine(arguments.checkpoint, slots=arguments.slots)
    answers = ask(
        engine,
        questions,
        plain=arguments.plain,
        blank=arguments.blank,
        max_new_tokens=arguments.max_new_tokens,
    )
    found = write(arguments.output, questions, answers)
    for kind, one in found.items():
        print(f"{kind:10} {one['right']:6.1%} of {one['count']}")
    print(f"{arguments.output / 'answers.jsonl'}")


if __name__ == "__main__":
    run(main)
