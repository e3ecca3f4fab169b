"""HellaSwag (Zellers et al. 2019): four endings of a scene, ranked as whole endings, without shots.

Files as in the publisher's repository: `data/hellaswag_val.jsonl`, with or without `data/`. Contexts and endings are
cleaned as lm-evaluation-harness does (tasks/hellaswag/utils.py: `ctx_b` in sentence case, bracketed headings dropped),
whose output OpenCompass' hellaswag_ppl_47bff9 reads: it takes what follows the first two ": " of the label and the
context, puts the ending on the next line, and compares by the mean log-likelihood of a token of the whole text. The
report's table was made with it. TFDS: the validation split of hellaswag, which does not say where `ctx_b` begins: its
contexts keep their case.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, numbered
from tasks.data_dir import benchmark_files


def cleaned(text: str) -> str:
    """Text without the marks of WikiHow's headings."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def example(row: Row, index: int, context: str) -> Example:
    """One scene.

    Raises:
        ValueError: the row is not as published, or has no label, as those of the test file.
    """
    query = cleaned(f"{row.get('activity_label', str)}: {context}")
    return Example(
        id=str(index),
        prompt=query.split(": ", 2)[-1] + "\n",
        choices=tuple(cleaned(ending) for ending in row.texts("endings", 4)),
        target=row.one_of("label", range(4)),
    )


def read(folder: Path) -> Iterator[Example]:
    """The scenes of the validation file."""
    inner = folder / "data"
    for index, row in enumerate(json_rows((inner if inner.is_dir() else folder) / "hellaswag_val.jsonl")):
        yield example(row, index, f"{row.get('ctx_a', str)} {row.get('ctx_b', str).capitalize()}")


def read_tfds(rows: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The scenes of the validation split."""
    for index, row in enumerate(numbered(rows("validation"), "hellaswag")):
        yield example(row, index, row.text("context"))


add_benchmark(
    Benchmark(
        name="hellaswag",
        title="HellaSwag",
        folder="hellaswag",
        files="data/hellaswag_val.jsonl",
        shots=0,
        read=read,
        answers=Choices(normalization="text"),
        tfds=TfdsSet(name="hellaswag:1.1.0", read=read_tfds),
        table="Table 17",
        source="rowanz/hellaswag; OpenCompass hellaswag_ppl_47bff9, lm-evaluation-harness tasks/hellaswag",
        size=10042,
    ),
    benchmark_files,
)
