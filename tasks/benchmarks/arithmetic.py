"""Arithmetic made by rule in the style of Math401, of `tools/make_arithmetic.py`: what no corpus holds.

File: `test.jsonl` of that tool, with `question` ("12+7="), `answer`, `kind` and `level`. Prompts, extraction and
metrics are those of `math401`; kinds are subjects.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows
from tasks.benchmarks import math401
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example]:
    """All calculations of the held-out file."""
    for index, row in enumerate(json_rows(folder / "test.jsonl")):
        question, target, kind = row.text("question"), row.text("answer"), row.text("kind")
        if extraction.value(target) is None:
            raise row.error(f"a number in 'answer', found {target!r}")
        extra = {"level": row.get("level", int)}
        yield Example(id=f"test/{index}", prompt=question, chat=question, target=target, subject=kind, extra=extra)


ARITHMETIC = Benchmark(
    name="arithmetic",
    title="Arithmetic",
    folder="arithmetic",
    files="test.jsonl of tools/make_arithmetic.py",
    shots=0,
    read=read,
    answers=math401.ANSWERS,
    source="tools/make_arithmetic.py; metrics of GanjinZero/math401-llm",
)
add_benchmark(ARITHMETIC, benchmark_files)
