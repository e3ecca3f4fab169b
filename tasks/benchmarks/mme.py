"""MME (Fu et al. 2023): fourteen tasks of perception and cognition, two questions a picture, answered by yes or no.

Files of the publisher: `eval_tool/Your_Results/TASK.txt` (picture, question, answer, with tabs between), and pictures
in `MME_Benchmark_release_version/TASK/` or its folder `images/` there. For chat models, as in eval_mm/mme/eval.py:
the picture, a line end, the question. A base model gets the same text. The publisher's score of a task is the share
of right answers plus the share of pictures with both right, times 100: their sums are the figures `perception` (of
2,000) and `cognition` (of 800). The score beside them, which is no figure of the paper, is the share of right
answers.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut, Outcome
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import text_lines
from qwen_jax.evaluation.vision.prompts import pictured
from tasks.data_dir import benchmark_files

GROUPS = {
    "perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
_PICTURES = "MME_Benchmark_release_version"


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions of all tasks; one whose file is not there is left out."""
    for task in (task for tasks in GROUPS.values() for task in tasks):
        file = folder / "eval_tool/Your_Results" / f"{task}.txt"
        if not file.is_file():
            yield LeftOut(where=str(file), reason="a task whose file is not there")
            continue
        counts: collections.Counter[str] = collections.Counter()
        for row in text_lines(file):
            fields = row.text("text").rstrip("\r").split("\t")
            if len(fields) < 3 or fields[2].lower() not in ("yes", "no"):
                raise row.error("a picture, a question, and Yes or No, with tabs between them")
            image, question, answer = fields[:3]
            counts[image] += 1
            beside = folder / _PICTURES / task / image
            path = beside if beside.is_file() else folder / _PICTURES / task / "images" / image
            parts: dict[str, Any] = pictured(path, f"\n{question}")
            yield Example(
                id=f"{task}/{image}/{counts[image]}",
                subject=task,
                target=answer.lower(),
                chat=parts["prompt"],
                chat_parts=parts["parts"],
                extra={"image": image},
                **parts,
            )


def yes_or_no(text: str, example: Example) -> str | None:
    """The answer as the publisher's script reads it: the whole reply, or else its first four characters."""
    text = text.lower().strip()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def totals(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """The publisher's sums over the tasks that were read."""
    by_task: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for example, outcome in zip(examples, outcomes, strict=True):
        by_task[example.subject][example.extra["image"]].append(next(iter(outcome.score.values())))
    found = {}
    for group, tasks in GROUPS.items():
        found[f"mean/{group}"] = 0.0
        for pictures in (by_task[task] for task in tasks if task in by_task):
            answers = [score for scores in pictures.values() for score in scores]
            # As the publisher's script counts: a picture with one question is never right as a whole.
            both = sum(sum(scores) == 2 for scores in pictures.values()) / len(pictures)
            found[f"mean/{group}"] += 100 * (sum(answers) / len(answers) + both)
    return found


add_benchmark(
    Benchmark(
        name="mme",
        title="MME",
        folder="mme",
        files=f"eval_tool/Your_Results/TASK.txt and {_PICTURES}/TASK/",
        shots=0,
        read=read,
        answers=Generation(
            max_new_tokens=16,
            extract={"answer": yes_or_no},
            judge=lambda answer, example: answer == example.target,
        ),
        groups=GROUPS,
        summary=totals,
        table="Qwen-VL, Table 7",
        source="BradyFU/Awesome-Multimodal-Large-Language-Models eval_tool; QwenLM/Qwen-VL eval_mm/mme/eval.py",
        size=2374,
    ),
    benchmark_files,
)
