"""BoolQ (Clark et al. 2019): yes or no questions on a passage, without shots.

Files: SuperGLUE's `SuperGLUE/BoolQ/val.jsonl` (question, passage that begins with its title, idx, label), or the
publisher's `dev.jsonl` (question, title, passage, answer), which has the same questions; a title is put before its
passage as SuperGLUE does. Prompt, and comparison by the mean log-likelihood of a token of the whole text, as in
OpenCompass' SuperGLUE_BoolQ_ppl_314b96, with which the report's table was made. TFDS: the validation split of bool_q.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, numbered
from tasks.data_dir import benchmark_files

# The copy of OpenCompass has the truth values as text.
TRUTH = {"false": 0, "true": 1, False: 0, True: 1}


def examples(rows: Iterable[Row]) -> Iterator[Example]:
    """The questions of rows in either layout.

    Raises:
        ValueError: a row is in neither.
    """
    for index, row in enumerate(rows):
        passage, label = row.text("passage"), "answer" if "answer" in row.fields else "label"
        if label == "answer":
            passage = f"{row.text('title')} -- {passage}"
        yield Example(
            id=str(index),
            prompt=f"{passage}\nQuestion: {row.text('question')}?\n",
            choices=("No", "Yes"),
            target=TRUTH[row.one_of(label, TRUTH)],
        )


def read(folder: Path) -> Iterator[Example]:
    """The questions of the file that is there, SuperGLUE's before the publisher's."""
    superglue = folder / "SuperGLUE/BoolQ/val.jsonl"
    return examples(json_rows(superglue if superglue.is_file() else folder / "dev.jsonl"))


def read_tfds(rows: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The questions of the validation split."""
    return examples(numbered(rows("validation"), "bool_q"))


add_benchmark(
    Benchmark(
        name="boolq",
        title="BoolQ",
        folder="boolq",
        files="SuperGLUE/BoolQ/val.jsonl or dev.jsonl",
        shots=0,
        read=read,
        answers=Choices(normalization="text"),
        tfds=TfdsSet(name="bool_q:1.0.0", read=read_tfds),
        table="Table 16",
        source="google-research-datasets/boolean-questions, SuperGLUE; OpenCompass SuperGLUE_BoolQ_ppl_314b96",
        size=3270,
    ),
    benchmark_files,
)
