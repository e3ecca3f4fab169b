"""TextVQA (Singh et al. 2019): questions about text in photographs, with ten answers of people each.

Files of the publisher: `TextVQA_0.5.1_val.json`, and its pictures in `train_images/`. Prompt, limit and scores as of
`vqav2`. The published figures are of models that see no tokens of an OCR system in the prompt, and so it is here.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Example
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_items
from qwen_jax.evaluation.vision.prompts import asked
from tasks.benchmarks.vqav2 import SHORT_ANSWER
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example]:
    """The questions of the validation file."""
    for row in json_items(folder / "TextVQA_0.5.1_val.json", "data"):
        answers = row.texts("answers")
        if len(answers) < 2:
            raise row.error(f"at least two texts in 'answers', found {len(answers)}")
        image = folder / f"train_images/{row.text('image_id')}.jpg"
        yield Example(id=str(row.get("question_id", int)), target=answers, **asked(image, row.text("question")))


add_benchmark(
    Benchmark(
        name="textvqa",
        title="TextVQA val",
        folder="textvqa",
        files="TextVQA_0.5.1_val.json and train_images/*.jpg",
        shots=0,
        read=read,
        answers=SHORT_ANSWER,
        table="Qwen-VL, Table 5",
        report={"Qwen-VL": 63.8, "Qwen-VL-Chat": 61.5},
        source="TextVQA 0.5.1; QwenLM/Qwen-VL eval_mm/evaluate_vqa.py, vqa_eval.py",
        size=5000,
    ),
    benchmark_files,
)
