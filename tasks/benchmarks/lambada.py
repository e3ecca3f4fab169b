"""LAMBADA (Paperno et al. 2016): the last word of passages, without shots.

Files in either form: OpenAI's `lambada_test.jsonl` with `text`, in its own case and spacing, which is read where it is
there; else the publisher's `lambada_test_plain_text.txt`, tokenized and lower-cased, one passage a line. Prompts and
limit of five tokens as in OpenCompass' lambada_gen_8b48a5 (base models) and lambada_gen_217e11 (chat models), with
which the report's table was made; as its LambadaEvaluator, the first word counts, up to a punctuation mark and without
articles. lm-evaluation-harness ranks the last word by likelihood instead, which gives other figures.
"""

import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows, numbered, text_lines
from tasks.data_dir import benchmark_files


def word(text: str, example: Example) -> str | None:
    """The first word of a text, up to a punctuation mark; None: there is none."""
    first = extraction.without_thinking(text).strip().split(" ")[0]
    return _plain(re.split(f"[{re.escape(string.punctuation)}]", first)[0]) or None


def _plain(text: str) -> str:
    """Up to a full stop or comma, without punctuation and articles; case counts."""
    text = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text, maxsplit=1)[0])
    return " ".join(re.sub(r"\b(a|an|the)\b", "", text, flags=re.IGNORECASE).split())


def example(row: Row, field: str, index: int) -> Example:
    """The example of a passage.

    Raises:
        ValueError: the passage is one word.
    """
    passage, _, last = row.text(field).strip().rpartition(" ")
    if not passage:
        raise row.error(f"a passage of several words, found {last!r}")
    prompt = f"Please complete the following sentence: {passage}"
    chat = f"Please complete the following sentence:\n{passage}"
    return Example(id=f"test/{index}", prompt=prompt, chat=chat, target=last)


def read(folder: Path) -> Iterator[Example]:
    """The passages of the test file."""
    file = folder / "lambada_test.jsonl"
    rows = json_rows(file) if file.is_file() else text_lines(folder / "lambada_test_plain_text.txt")
    for index, row in enumerate(rows):
        yield example(row, "text", index)


def from_tfds(split: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The passages of TFDS' test split, which are the publisher's."""
    for index, row in enumerate(numbered(split("test"), "lambada of TFDS, test")):
        yield example(row, "passage", index)


LAMBADA = Benchmark(
    name="lambada",
    title="LAMBADA",
    folder="lambada",
    files="lambada_test.jsonl or lambada_test_plain_text.txt",
    shots=0,
    read=read,
    answers=Generation(
        max_new_tokens=5,
        extract={"word": word},
        judge=lambda found, example: found == _plain(example.target),
    ),
    tfds=TfdsSet(name="lambada:1.0.0", read=from_tfds),
    table="Table 16",
    source="LAMBADA, and OpenAI's copy; OpenCompass lambada_gen_8b48a5, lambada_gen_217e11 and LambadaEvaluator",
    size=5153,
)
add_benchmark(LAMBADA, benchmark_files)
