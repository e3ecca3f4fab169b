"""CommonsenseQA (Talmor et al. 2019): questions of five choices, ranked by the text of the choice, with eight shots.

Files of the publisher's random split: `train_rand_split.jsonl` for shots and `dev_rand_split.jsonl` for questions; the
test file has no answers. Prompt and the line ends between shots, and comparison by the mean log-likelihood of a token
of the whole text, as in OpenCompass' commonsenseqa_ppl_5545e2, with which the report's table was made. That one takes
the eight shots of each question from the 30 nearest of a sentence encoder by the perplexity of the model itself; these
are the first eight of the training file, as in its commonsenseqa_ppl_e51e32. TFDS has no CommonsenseQA.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, first_rows, json_rows
from tasks.data_dir import benchmark_files

LETTERS = "ABCDE"


def parts(row: Row) -> tuple[str, list[str], int]:
    """(question ready for an answer, choices, index of the right one) of a row.

    Raises:
        ValueError: the row is not as published, or has no answer.
    """
    question = row.row("question")
    choices = [Row(row.where, choice) for choice in question.get("choices", list) if isinstance(choice, dict)]
    if [choice.fields.get("label") for choice in choices] != list(LETTERS):
        raise row.error("five choices with the labels A to E")
    texts = [choice.text("text") for choice in choices]
    return f"Question: {question.text('stem')}\nAnswer: \n", texts, LETTERS.index(row.one_of("answerKey", LETTERS))


def read(folder: Path) -> Iterator[Example]:
    """The questions of the dev file."""
    train = folder / "train_rand_split.jsonl"
    solved = [parts(row) for row in first_rows(train, json_rows(train), COMMONSENSEQA.shots)]
    header = "\n\n\n".join(question + texts[right] for question, texts, right in solved) + "\n\n\n\n\n"
    for row in json_rows(folder / "dev_rand_split.jsonl"):
        question, texts, right = parts(row)
        yield Example(id=row.text("id"), prompt=header + question, choices=tuple(texts), target=right)


COMMONSENSEQA = Benchmark(
    name="commonsenseqa",
    title="CommonsenseQA",
    folder="commonsenseqa",
    files="train_rand_split.jsonl and dev_rand_split.jsonl",
    shots=8,
    read=read,
    answers=Choices(normalization="text"),
    table="Table 16",
    source="CommonsenseQA 1.11; OpenCompass commonsenseqa_ppl_5545e2, shots of commonsenseqa_ppl_e51e32",
    size=1221,
)
add_benchmark(COMMONSENSEQA, benchmark_files)
