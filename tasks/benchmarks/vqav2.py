"""VQAv2 and OK-VQA: questions about photographs of COCO with ten answers of people each.

Files of the publisher: questions (`…_questions.json`) and annotations (`…_annotations.json`) of the validation set,
and the pictures of COCO in `val2014/`. Prompt and limit of 10 tokens as in eval_mm/evaluate_vqa.py. Two scores:
`official` is the accuracy of the evaluation code of VQA, `released` that of the released copy, which leaves numbers
of references in words (`qwen_jax.evaluation.vision.visual_answers`); the published figures are of the latter.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_items
from qwen_jax.evaluation.vision.prompts import asked
from qwen_jax.evaluation.vision.visual_answers import vqa_accuracy
from tasks.data_dir import benchmark_files


def answers_of(row: Row) -> list[str]:
    """The reference answers of an annotation."""
    rows = [Row(row.where, one) if isinstance(one, dict) else None for one in row.get("answers", list)]
    if len(rows) < 2 or None in rows:
        raise row.error("objects with an answer in 'answers', at least two")
    return [one.get("answer", str) for one in rows if one is not None]


def reader(questions: str, annotations: str) -> Callable[[Path], Iterator[Example]]:
    """The reader of two files of these names."""

    def read(folder: Path) -> Iterator[Example]:
        found = {row.get("question_id", int): row for row in json_items(folder / annotations, "annotations")}
        for row in json_items(folder / questions, "questions"):
            number, image = row.get("question_id", int), row.get("image_id", int)
            if number not in found:
                raise row.error(f"an annotation of question {number} in {annotations}, found none: is the file cut?")
            yield Example(
                id=str(number),
                target=answers_of(found[number]),
                **asked(folder / f"val2014/COCO_val2014_{image:012d}.jpg", row.text("question")),
            )

    return read


def released(text: str, example: Example) -> dict[str, str] | None:
    """The answer, marked for the rules of the released evaluation."""
    return {"released": text.strip()} if text.strip() else None


def accuracy(answer: Any, example: Example) -> float:
    """VQA accuracy of an answer, by the rules that it is marked for."""
    if isinstance(answer, dict):
        return vqa_accuracy(answer["released"], example.target, released=True)
    return vqa_accuracy(answer, example.target)


SHORT_ANSWER = Generation(
    max_new_tokens=10,
    stop=("\n",),
    extract={"official": lambda text, _: text.strip() or None, "released": released},
    judge=accuracy,
)
for _name, _title, _files, _report, _size in (
    (
        "vqav2",
        "VQAv2 val",
        ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        {"Qwen-VL": 78.8, "Qwen-VL-Chat": 78.2},
        214354,
    ),
    (
        "okvqa",
        "OK-VQA val",
        ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
        {"Qwen-VL": 58.6, "Qwen-VL-Chat": 56.6},
        5046,
    ),
):
    add_benchmark(
        Benchmark(
            name=_name,
            title=_title,
            folder=_name,
            files=f"{_files[0]}, {_files[1]} and val2014/*.jpg",
            shots=0,
            read=reader(*_files),
            answers=SHORT_ANSWER,
            table="Qwen-VL, Table 4",
            report=_report,
            source="GT-Vision-Lab/VQA; QwenLM/Qwen-VL eval_mm/evaluate_vqa.py, vqa_eval.py",
            size=_size,
        ),
        benchmark_files,
    )
