"""Math401 (Yuan et al. 2023): 401 calculations from 1+1 to trigonometry, without shots.

File of the publisher: `math401.json`, which holds JSON lines of `query` ("1+1=") and `response`. The query is the whole
prompt, of a base model to the end of the line and of a chat model; the report says no more than that it decodes
greedily. Of a text, the last number counts. Accuracy and relative error are those of the publisher's README: right is
what differs by less than 0.001, the relative error is at most 10, and 10 where there is no number. OpenCompass'
math401_gen_ab5f39 takes four of these calculations as shots, so it is not followed.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows
from tasks.data_dir import benchmark_files

LARGEST_ERROR = 10.0


def close(answer: str, example: Example) -> bool:
    """Whether a number differs from the target by less than 0.001."""
    found, target = extraction.value(answer), extraction.value(example.target)
    return found is not None and target is not None and abs(found - target) < 1e-3


def relative_error(answer: str | None, example: Example) -> float:
    """The publisher's relative error, in [0, 10]."""
    found, target = extraction.value(answer or ""), extraction.value(example.target)
    if found is None or target is None:
        return LARGEST_ERROR
    # Compared first: an error of 1e400 is no float.
    return float(min(LARGEST_ERROR, abs(found - target) / max(abs(target), 1)))


def read(folder: Path) -> Iterator[Example]:
    """All calculations."""
    for index, row in enumerate(json_rows(folder / "math401.json")):
        query, target = row.text("query"), row.text("response").replace(",", "")
        if extraction.value(target) is None:
            raise row.error(f"a number in 'response', found {target!r}")
        yield Example(id=f"math401/{index}", prompt=query, chat=query, target=target)


ANSWERS = Generation(
    max_new_tokens=256,
    stop=("\n",),
    extract={"number": lambda text, _: extraction.last_number(extraction.cut(text.lstrip("\n"), ("\n",)))},
    chat_extract={"number": lambda text, _: extraction.last_number(extraction.without_thinking(text))},
    judge=close,
    figures={"relative_error": relative_error},
)
MATH401 = Benchmark(
    name="math401",
    title="Math401",
    folder="math401",
    files="math401.json",
    shots=0,
    read=read,
    answers=ANSWERS,
    table="Table 12",
    report={"Math-Qwen-7B-Chat": 80.8, "Math-Qwen-14B-Chat": 85.0},
    source="GanjinZero/math401-llm, README for both metrics",
    size=401,
)
add_benchmark(MATH401, benchmark_files)
