"""ARC-Easy (Clark et al. 2018): science questions of four choices, ranked by the text of the choice, without shots.

Files as in the publisher's archive: `ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl`, with or without the outer folder.
Prompt, and comparison by the mean log-likelihood of a token of the whole text, as in OpenCompass' ARC_e_ppl_a450bd,
with which the report's table was made. As there, the questions are those of Dev, and the few that have not four choices
are left out. TFDS: the validation split of ai2_arc/ARC-Easy.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, numbered
from tasks.data_dir import benchmark_files


def examples(rows: Iterable[Row]) -> Iterator[Example | LeftOut]:
    """The questions of rows as in the publisher's files.

    Raises:
        ValueError: a row is not as published.
    """
    for row in rows:
        question = row.row("question")
        choices = [Row(row.where, choice) for choice in question.get("choices", list) if isinstance(choice, dict)]
        if len(choices) != 4:
            yield LeftOut(where=row.where, reason="not four choices")
            continue
        labels = [choice.text("label") for choice in choices]
        yield Example(
            id=row.text("id"),
            prompt=f"Question: {question.text('stem')}\nAnswer: \n",
            choices=tuple(choice.text("text") for choice in choices),
            target=labels.index(row.one_of("answerKey", labels)),
        )


def read_files(folder: Path, name: str) -> Iterator[Example | LeftOut]:
    """The questions of the Dev file of a set, "ARC-Easy" or "ARC-Challenge"."""
    outer = folder / "ARC-V1-Feb2018-2"
    return examples(json_rows((outer if outer.is_dir() else folder) / name / f"{name}-Dev.jsonl"))


def read_tfds(rows: Callable[[str], Iterator[dict]], name: str) -> Iterator[Example | LeftOut]:
    """The questions of the validation split of a set, whose labels are numbers."""
    for row in numbered(rows("validation"), f"ai2_arc/{name}"):
        choices = row.row("choices")
        pairs = zip(choices.texts("text"), choices.get("label", list), strict=True)
        question = {"stem": row.text("question"), "choices": [{"text": text, "label": str(n)} for text, n in pairs]}
        published = {"id": row.text("id"), "question": question, "answerKey": str(row.get("answerKey", int))}
        yield from examples([Row(row.where, published)])


add_benchmark(
    Benchmark(
        name="arc_easy",
        title="ARC-e",
        folder="arc",
        files="ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl",
        shots=0,
        read=lambda folder: read_files(folder, "ARC-Easy"),
        answers=Choices(normalization="text"),
        tfds=TfdsSet(name="ai2_arc/ARC-Easy:1.0.0", read=lambda rows: read_tfds(rows, "ARC-Easy")),
        table="Table 15",
        source="allenai ARC-V1-Feb2018; OpenCompass ARC_e_ppl_a450bd",
        size=567,
    ),
    benchmark_files,
)
