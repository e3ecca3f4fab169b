"""DocVQA (Mathew et al. 2021), task 1: questions about scanned pages, scored by similarity of the text (ANLS).

Files of the publisher: `val/val_v1.0.json`, and the pages in `val/documents/`. Prompt and limit of 100 tokens as in
eval_mm/evaluate_vqa.py. The published figures are of the test set, whose answers its publisher keeps.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_items
from qwen_jax.evaluation.vision.prompts import asked
from qwen_jax.evaluation.vision.visual_answers import anls
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example]:
    """The questions of the validation file."""
    for row in json_items(folder / "val/val_v1.0.json", "data"):
        answers = row.texts("answers")
        if not answers:
            raise row.error("at least one text in 'answers', found none")
        image = folder / "val" / row.text("image")
        yield Example(id=str(row.get("questionId", int)), target=answers, **asked(image, row.text("question")))


add_benchmark(
    Benchmark(
        name="docvqa",
        title="DocVQA val",
        folder="docvqa",
        files="val/val_v1.0.json and val/documents/*.png",
        shots=0,
        read=read,
        answers=Generation(
            max_new_tokens=100,
            stop=("\n",),
            extract={"answer": lambda text, _: text.strip() or None},
            judge=lambda answer, example: anls(answer, example.target),
        ),
        table="Qwen-VL, Table 5",
        report={"Qwen-VL": 65.1, "Qwen-VL-Chat": 62.6},
        source="DocVQA (rrc.cvc.uab.es); QwenLM/Qwen-VL eval_mm/evaluate_vqa.py, infographicsvqa_eval.py",
        size=5349,
    ),
    benchmark_files,
)
