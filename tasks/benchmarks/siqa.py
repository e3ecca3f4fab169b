"""SIQA (Social IQa, Sap et al. 2019): three answers to a question about people, ranked as whole answers, without shots.

Files as in the publisher's archive: `socialiqa-train-dev/dev.jsonl` (context, question, answerA to answerC) with one
label from 1 to 3 a line in `dev-labels.lst`. Prompt, and comparison by the mean log-likelihood of a token of the whole
text, as in OpenCompass' siqa_ppl_ced5f6, with which the report's table was made. TFDS has no Social IQa.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows, labels
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example]:
    """The questions of the dev file.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a row or label is not as published, or one has none beside it.
    """
    file = folder / "socialiqa-train-dev/dev.jsonl"
    rows = list(json_rows(file))
    found = labels(file.with_name("dev-labels.lst"), rows, ("1", "2", "3"))
    for index, (row, label) in enumerate(zip(rows, found, strict=True)):
        yield Example(
            id=str(index),
            prompt=f"{row.text('context')}\nQuestion: {row.text('question')}\nAnswer:\n",
            choices=tuple(row.text(f"answer{letter}") for letter in "ABC"),
            target=int(label) - 1,
        )


add_benchmark(
    Benchmark(
        name="siqa",
        title="SIQA",
        folder="siqa",
        files="socialiqa-train-dev/dev.jsonl and socialiqa-train-dev/dev-labels.lst",
        shots=0,
        read=read,
        answers=Choices(normalization="text"),
        table="Table 17",
        source="Social IQa (allenai); OpenCompass siqa_ppl_ced5f6",
        size=1954,
    ),
    benchmark_files,
)
