"""PIQA (Bisk et al. 2020): two ways to a physical goal, ranked as whole texts, without shots.

Files as the publisher serves them: `piqa/data/valid.jsonl` with one label a line in `valid-labels.lst`, or those of its
archive, `physicaliqa-train-dev/dev.jsonl` and `dev-labels.lst`; the tests have no labels. Prompt, and comparison by the
mean log-likelihood of a token of the whole text with its last line end, as in OpenCompass' piqa_ppl_1cf9f0, with which
the report's table was made. TFDS: the validation split of piqa.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, labels, numbered
from tasks.data_dir import benchmark_files


def example(row: Row, index: int, target: int) -> Example:
    """One goal.

    Raises:
        ValueError: the row is not as published.
    """
    return Example(
        id=str(index),
        prompt=f"The following makes sense: \nQ: {row.text('goal')}\nA: ",
        choices=(f"{row.text('sol1')}\n", f"{row.text('sol2')}\n"),
        target=target,
    )


def read(folder: Path) -> Iterator[Example]:
    """The goals of the validation file."""
    archive = folder / "physicaliqa-train-dev"
    file = archive / "dev.jsonl" if archive.is_dir() else folder / "piqa/data/valid.jsonl"
    rows = list(json_rows(file))
    found = labels(file.with_name(f"{file.stem}-labels.lst"), rows, ("0", "1"))
    for index, (row, label) in enumerate(zip(rows, found, strict=True)):
        yield example(row, index, int(label))


def read_tfds(rows: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The goals of the validation split."""
    for index, row in enumerate(numbered(rows("validation"), "piqa")):
        yield example(row, index, row.one_of("label", (0, 1)))


add_benchmark(
    Benchmark(
        name="piqa",
        title="PIQA",
        folder="piqa",
        files="piqa/data/valid.jsonl and piqa/data/valid-labels.lst",
        shots=0,
        read=read,
        answers=Choices(normalization="text"),
        tfds=TfdsSet(name="piqa:1.0.0", read=read_tfds),
        table="Table 17",
        source="ybisk/ybisk.github.io; OpenCompass piqa_ppl_1cf9f0",
        size=1838,
    ),
    benchmark_files,
)
