"""NaturalQuestions (Kwiatkowski et al. 2019), open form: questions with short answers, without shots.

File of the publisher: `nq_open/NQ-open.dev.jsonl` with `question` and `answer`, a list. Prompts as in OpenCompass'
nq_gen_2463e2 (base models) and nq_gen_a6ffca (chat models), with which the report's table was made. As its NQEvaluator,
the first line counts, what follows "answer is" in it, up to the first full stop or comma, without case, punctuation and
articles; it is right if it equals one of the answers. Later versions of OpenCompass count an answer that stands
anywhere in it: that share is the figure `contains`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, numbered
from tasks.data_dir import benchmark_files


def normalized(text: str) -> str:
    """A short text up to its first line end, full stop or comma, without case, punctuation and articles."""
    text = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text.lower(), maxsplit=1)[0])
    return " ".join(re.sub(r"\b(a|an|the)\b", "", text).split())


def answer(text: str, example: Example) -> str | None:
    """The short answer of a text; None: the text is empty."""
    first = extraction.without_thinking(text).strip().split("\n")[0].lower()
    return normalized(first.rpartition("answer is")[2]) or None


def contains(found: str | None, example: Example) -> float:
    """Whether one of the answers stands in the text that was found."""
    return float(found is not None and any(normalized(one) in found for one in example.target))


def example(row: Row, index: int) -> Example:
    """The example of a row."""
    answers = row.texts("answer")
    if not answers:
        raise row.error("at least one text in 'answer', found none")
    prompt = f"Answer these questions:\nQ: {row.text('question')}?\nA:"
    return Example(id=f"dev/{index}", prompt=prompt, chat=prompt, target=answers)


def read(folder: Path) -> Iterator[Example]:
    """The questions of the dev file."""
    for index, row in enumerate(json_rows(folder / "nq_open/NQ-open.dev.jsonl")):
        yield example(row, index)


def from_tfds(split: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The questions of TFDS' validation split."""
    for index, row in enumerate(numbered(split("validation"), "natural_questions_open of TFDS, validation")):
        yield example(row, index)


NATURAL_QUESTIONS = Benchmark(
    name="natural_questions",
    title="NaturalQuestions",
    folder="natural_questions_open",
    files="nq_open/NQ-open.dev.jsonl",
    shots=0,
    read=read,
    answers=Generation(
        max_new_tokens=50,
        stop=("\n",),
        extract={"answer": answer},
        judge=lambda found, example: found in map(normalized, example.target),
        figures={"contains": contains},
    ),
    tfds=TfdsSet(name="natural_questions_open:1.0.0", read=from_tfds),
    table="Table 16",
    source="google-research-datasets/natural-questions; OpenCompass nq_gen_2463e2, nq_gen_a6ffca and NQEvaluator",
    size=3610,
)
add_benchmark(NATURAL_QUESTIONS, benchmark_files)
