"""Teaches a tiny model to see, in the three stages of Qwen-VL (arXiv 2308.12966), and measures it around each.

    make vision
    python tools/vision.py --output runs/vision

Pictures are drawn by rule: shapes in colors, and signs in English and Chinese. A base model learns from descriptions in
words. In stage 1 an image encoder learns to make captions of it, the decoder frozen; in stage 2 everything learns
captions, questions, boxes and reading; in stage 3 the decoder learns dialogues, and to compare two pictures, the
encoder frozen. Held-out pictures are asked about after each, and text is measured, too. Every step is one command,
printed before it runs, that works the same on its own; a second call goes on where the first one was stopped. At the
end it draws vision.png, writes table.md, and fails if a claim does not hold:

    stage 1   at least {caption:.0%} of the captions equal in every word, at most {none:.0%} before
    stage 2   at least {question:.0%} of questions, {box:.0%} of boxes (IoU above 0.5), {reading:.0%} of signs
    stage 3   at least {comparison:.0%} of the comparisons of two pictures
    text      at most {text:g} bits per byte more than before, of held-out text
    looking   at most {blind:.0%} of the questions, with gray pictures
"""

import resource
import textwrap
from pathlib import Path

from shown_commands import Step, run, tell

from qwen_jax import files

LIMITS = {
    "caption": 0.5,
    "none": 0.05,
    "question": 0.8,
    "box": 0.6,
    "reading": 0.6,
    "comparison": 0.8,
    "text": 0.05,
    "blind": 0.5,
}
# Measured models, in the order of the table; "blank" is the last one, shown gray pictures.
MODELS = {
    "before": "before",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
    "stage3": "after stage 3",
    "blank": "after stage 3, gray pictures",
}
QUESTIONS = ("color", "shape", "count", "place")
COLUMNS = {
    "caption": ("describe",),
    "cells": ("cells",),
    "question": QUESTIONS,
    "box": ("find",),
    "name": ("name",),
    "reading": ("read",),
    "comparison": ("compare",),
}
# The model of a rehearsal.
TOY = [f"ModelConfig.{one}" for one in ("num_layers=1", "num_heads=2", "ffn_size=64", "vocab_size=752")]
TOY += ["VisionConfig.num_layers=1", "VisionConfig.image_start_id=742"]
TOY += ["TRAIN_STEPS=2", "WARMUP_STEPS=1", "EVAL_BATCHES=1", "BATCH_SIZE=2"]
TITLES = ("captions", "cells", "questions", "boxes", "naming", "reading", "comparing")


def steps(folder: Path, seed: int, rehearse: bool, settings: list[str]) -> list[Step]:
    """All commands: data, vocabulary, four trainings, and the measuring of each."""
    data = folder / "data"
    sizes = ("--pairs=24", "--tasks=24", "--dialogues=24", "--texts=200", "--held_out=2") if rehearse else ()

    def train(heading: str, recipe: str, name: str, *bindings: str, cache: str = "") -> Step:
        places = (f"VOCABULARY={folder / 'vocabulary.tiktoken'}", f"CACHE_DIR={folder / 'cache' / (cache or name)}")
        names = (*settings, *bindings, *places, f"OUTPUT_DIR={folder / name}", f"SEED={seed}")
        recipes = (f"--gin_file=gin/runs/{recipe}.gin", "--gin_file=gin/hardware/cpu.gin")
        return Step(heading, ("-m", "qwen_jax.train", *recipes, *(f"--gin.{one}" for one in names)))

    def ask(name: str, *flags: str, of: str = "") -> Step:
        where = ("--checkpoint", f"{folder / (of or name)}", "--output", f"{folder / 'measured' / name}")
        questions = ("--questions", f"{data / 'held_out/questions.jsonl'}")
        return Step("", ("tools/measure_vision.py", *where, *questions, *flags))

    def text(name: str) -> Step:
        where = ("--checkpoint", f"{folder / name}", "--output", f"{folder / 'measured' / name}")
        texts = ("--texts", f"{data / 'held_out/text.jsonl'}")
        return Step("", ("tools/measure_perplexity.py", *where, *texts))

    pairs, base = f"vision_pairs.pattern={data / 'pairs.jsonl'}", f"INITIAL_CHECKPOINT={folder / 'base'}"
    replay = f"vision_text.pattern={data / 'replay.jsonl'}"
    untrained = ("TRAIN_STEPS=1", "WARMUP_STEPS=0", "PEAK_LEARNING_RATE=1e-12", "EVAL_EVERY=0")
    return [
        Step(
            "pictures with captions, questions and dialogues",
            ("tools/make_pictures.py", "--output", f"{data}", f"--seed={seed}", *sizes),
        ),
        Step(
            "a vocabulary for them",
            (
                *("tools/build_tokenizer.py", f"--size={736 if rehearse else 960}"),
                *("--input", f"text:{data / 'text.jsonl'}", f"frame:{data / 'frame.jsonl'}:1000"),
                f"--output={folder / 'vocabulary.tiktoken'}",
            ),
        ),
        train(
            "a base model learns to read maps in words, in documents and dialogues",
            *("vl_base_toy", "base", f"vision_chat.pattern={data / 'maps.jsonl'}"),
            f"vision_text.pattern={data / 'text.jsonl'}",
        ),
        train(
            "before: the base model, and an encoder that has learned nothing",
            *("vl_stage1_toy", "before", base, pairs, *untrained),
            cache="stage1",
        ),
        ask("before", "--plain"),
        text("before"),
        train("stage 1: the encoder learns from captions", "vl_stage1_toy", "stage1", base, pairs),
        ask("stage1", "--plain"),
        train(
            "stage 2: all of it learns captions, questions, boxes and reading",
            *("vl_stage2_toy", "stage2", f"INITIAL_CHECKPOINT={folder / 'stage1'}"),
            *(f"vision_chat.pattern={data / 'tasks.jsonl'}", replay),
        ),
        ask("stage2"),
        text("stage2"),
        train(
            "stage 3: the decoder learns dialogues and comparing two pictures",
            *("vl_stage3_toy", "stage3", f"INITIAL_CHECKPOINT={folder / 'stage2'}"),
            *(f"vision_chat.pattern={data / 'dialogues.jsonl'}", replay),
        ),
        ask("stage3"),
        text("stage3"),
        ask("blank", "--blank", of="stage3"),
    ]


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """What was measured of each model: shares of right answers by column, and `text` in bits per byte."""
    found = {}
    for name in MODELS:
        kinds = files.read_json(folder / "measured" / name / "scores.json")["kinds"]
        found[name] = {
            column: sum(kinds[one]["right"] for one in parts) / len(parts) for column, parts in COLUMNS.items()
        }
        if name not in ("stage1", "blank"):  # stage 1 leaves the decoder as it was, and gray pictures its text
            (group,) = files.read_json(folder / "measured" / name / "perplexity.json")["groups"]
            found[name]["text"] = group["bits_per_byte"]
    return found


def claims(found: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    """What is claimed, with its figures, and whether it holds."""
    made = []

    def share(model: str, column: str, limit: str, most: bool = False) -> None:
        value, bound = found[model][column], LIMITS[limit]
        told = f"{MODELS[model]}: {value:.1%} of {TITLES[list(COLUMNS).index(column)]} right"
        rule = f"at {'most' if most else 'least'} {bound:.0%} expected"
        made.append((f"{told}, {rule}", value <= bound if most else value >= bound))

    share("before", "caption", "none", most=True)
    share("stage1", "caption", "caption")
    for column in ("question", "box", "reading"):
        share("stage2", column, column)
    share("stage3", "comparison", "comparison")
    more = found["stage3"]["text"] - found["before"]["text"]
    text = f"after stage 3: {more:+.3f} bits per byte of text, at most {LIMITS['text']:+g} expected"
    made.append((text, more <= LIMITS["text"]))
    share("blank", "question", "blind", most=True)
    return made


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each model."""
    lines = [f"| model | {' | '.join(TITLES)} | text, bits per byte |", "|---" + "|--:" * (len(TITLES) + 1) + "|"]
    for name, titled in MODELS.items():
        cells = [f"{found[name][column]:.1%}" for column in COLUMNS]
        cells.append(f"{found[name]['text']:.3f}" if "text" in found[name] else "–")
        lines.append(f"| {titled} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(folder: Path) -> list[dict]:
    """The answers to draw: the first two English ones of each kind on which a title can be written, after stage 3."""
    rows = [row for _, row in files.read_json_lines(folder / "measured/stage3/answers.jsonl")]
    picked = []
    for kinds in COLUMNS.values():
        for kind in kinds if kinds != QUESTIONS else ("color", "place"):
            english = [row for row in rows if row["kind"] == kind and row["question"].isascii()]
            picked += english[: 1 if kinds == QUESTIONS else 2]
    return picked


def draw(rows: list[dict], path: Path) -> None:
    """Pictures with questions and answers; boxes of answers are drawn, those of references dashed."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    from qwen_jax.data.boxes import find_boxes

    across = 4
    figure = Figure(figsize=(3 * across, 3.3 * -(-len(rows) // across)), layout="constrained")
    panels = list(figure.subplots(-(-len(rows) // across), across, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, row in zip(panels, rows, strict=False):
        pictures = [Image.open(name).convert("RGB") for name in row["images"]]
        side = pictures[0].width
        gap = np.full((side, 4, 3), 255, np.uint8)
        joined = [part for picture in pictures for part in (np.asarray(picture), gap)][:-1]
        panel.imshow(np.concatenate(joined, axis=1))
        asked = row["question"].split("</img>")[-1].strip()
        for text, line, color in ((asked + row["reference"], "--", "black"), (row["answer"], "-", "magenta")):
            for one in find_boxes(text)[0]:
                (left, top), (right, bottom) = (
                    tuple(side * edge / 1000 for edge in point) for point in one.region.points
                )
                panel.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, ls=line, ec=color, lw=1.8)
                )
        asked = "What is in the box?" if find_boxes(asked)[0] else asked
        told = "drawn" if find_boxes(row["answer"])[0] else row["answer"]
        mark = "" if row["right"] or find_boxes(row["reference"])[0] else f"(right: {row['reference']})"
        title = "\n".join(textwrap.fill(line, 34) for line in (asked, told, mark) if line)
        panel.set_title(title, fontsize=9, color="black" if row["right"] else "firebrick")
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def closing(folder: Path, seconds: float) -> bool:
    """Writes and prints the table, draws the pictures, prints the claims; returns whether all hold."""
    found = figures(folder)
    files.write_text(folder / "table.md", table(found))
    draw(shown(folder), folder / "vision.png")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = (used.ru_utime + used.ru_stime) / 60
    print(f"\n== done in {seconds / 60:.1f} minutes, {processor:.1f} of processor time\n\n{table(found)}")
    held = claims(found)
    for text, true in held:
        print(f"{'holds' if true else 'FAILS'}  {text}")
    print(f"\n{folder / 'vision.png'} and table.md beside it; runs: {folder / 'stage3'} and the stages before it")
    print("next: docs/how_to/vision.md")
    return all(true for _, true in held)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a claim does not hold."""
    return tell(
        argv,
        __doc__.format(**LIMITS),
        "runs/vision",
        lambda given: steps(given.output, given.seed, given.rehearse, TOY if given.rehearse else []),
        lambda given, seconds: closing(given.output, seconds),
    )


if __name__ == "__main__":
    run(main)
