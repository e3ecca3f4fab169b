"""SEED-Bench (Li et al. 2023), questions about pictures, ranked by letters, by type of question.

Files of the publisher: `SEED-Bench.json`, and pictures in `SEED-Bench-image/`. Questions about videos are left out.
Prompt as in eval_mm/seed_bench/trans.py, and ranking by the mean log-likelihood of the letter as in eval.py there.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_items, json_object
from qwen_jax.evaluation.vision.prompts import options, pictured
from tasks.data_dir import benchmark_files

FILE = "SEED-Bench.json"


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions about pictures."""
    kinds = {number: name for name, number in json_object(folder / FILE).row("question_type").fields.items()}
    for row in json_items(folder / FILE, "questions"):
        if row.one_of("data_type", ("image", "video")) == "video":
            yield LeftOut(where=row.where, reason="a question about a video")
            continue
        choices = [row.get(f"choice_{letter}", (str, int, float)) for letter in "abcd"]
        text = f"\nQuestion: {row.text('question')}\nOptions: {options([str(one) for one in choices])}\nAnswer:"
        yield Example(
            id=str(row.get("question_id", (str, int))),
            subject=row.one_of("question_type_id", kinds) and kinds[row.fields["question_type_id"]],
            choices=(" A", " B", " C", " D"),
            target="ABCD".index(row.one_of("answer", "ABCD")),
            **pictured(folder / "SEED-Bench-image" / row.text("data_id"), text),
        )


add_benchmark(
    Benchmark(
        name="seed_bench",
        title="SEED-Bench img",
        folder="seed_bench",
        files=f"{FILE} and SEED-Bench-image/",
        shots=0,
        read=read,
        answers=Choices(normalization="tokens", apart=True),
        table="Qwen-VL, Table 7",
        report={"Qwen-VL-Chat": 65.4},
        source="AILab-CVC/SEED-Bench; QwenLM/Qwen-VL eval_mm/seed_bench/trans.py, eval.py",
        size=14233,
    ),
    benchmark_files,
)
