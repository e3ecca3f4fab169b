"""OCNLI (Hu et al. 2020): how two Chinese sentences relate, ranked by a word for each relation, without shots.

Files as in the publisher's repository: `data/ocnli/dev.json`, JSON lines, with or without the folders. Rows whose
annotators did not agree have the label "-" and are left out, as the publisher and CLUE do. Prompt and words, and
comparison by the mean log-likelihood of a token of the whole text, as in OpenCompass' CLUE_ocnli_ppl_fdc6de, with which
the report's table was made; that one also counts the rows without a label, as wrong. TFDS has no OCNLI.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows
from tasks.data_dir import benchmark_files

WORDS = {"contradiction": "矛盾", "entailment": "蕴含", "neutral": "无关"}


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The pairs of the dev file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a row is not as published.
    """
    inner = folder / "data/ocnli"
    for row in json_rows((inner if inner.is_dir() else folder) / "dev.json"):
        if row.one_of("label", (*WORDS, "-")) == "-":
            yield LeftOut(where=row.where, reason="annotators did not agree")
            continue
        sentences = f"语句一：“{row.text('sentence1')}”\n语句二：“{row.text('sentence2')}”\n"
        yield Example(
            id=str(row.get("id", int)),
            prompt=f"{sentences}请问这两句话是什么关系？\n",
            choices=tuple(WORDS.values()),
            target=list(WORDS).index(row.fields["label"]),
        )


add_benchmark(
    Benchmark(
        name="ocnli",
        title="OCNLI",
        folder="ocnli",
        files="data/ocnli/dev.json",
        shots=0,
        read=read,
        answers=Choices(normalization="text"),
        table="Table 17",
        source="CLUEbenchmark/OCNLI; OpenCompass CLUE_ocnli_ppl_fdc6de",
        size=2950,
    ),
    benchmark_files,
)
