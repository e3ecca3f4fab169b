"""GSM8K (Cobbe et al. 2021): grade-school word problems, with eight worked examples.

Files of the publisher: `test.jsonl`, and `train.jsonl` for the examples. These are the eight of the released
gsm8k_prompt.txt, which are rows of the training file without its calculator annotations; layout, cuts and the limit of
512 tokens are those of evaluate_gsm8k.py and the released generation settings. Gold follows "####". Two extractions:
`number` takes the last number, `released` the last run of digits as that script does ("1,234" is 234 to it), and both
are reported. A chat model gets the bare question, as in evaluate_chat_gsm8k.py.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, first_rows, json_rows, numbered
from tasks.data_dir import benchmark_files

# Rows of train.jsonl, from 0, and the begin of the SHA-256 of their questions: TFDS has them in another order.
SHOTS = {
    4997: "d97272d2",
    4280: "d9655201",
    3996: "9ecbe4ab",
    1344: "9e72bae5",
    6011: "17ce48ef",
    328: "03260940",
    3809: "dbd9ea0d",
    2053: "22f45bbd",
}
STEPS = "\nLet's think step by step\n"


def digest(question: str) -> str:
    """The begin of the SHA-256 of a question."""
    return hashlib.sha256(question.encode()).hexdigest()[:8]


def solved(row: Row) -> str:
    """A worked example."""
    worked, _, gold = row.text("answer").rpartition("\n#### ")
    return f"Question: {row.text('question')}{STEPS}{re.sub('<<.*?>>', '', worked)}\nThe answer is {gold}\n\n"


def example(row: Row, shots: Sequence[Row], index: int) -> Example:
    """The example of a row.

    Raises:
        ValueError: no number follows "####" in the answer.
    """
    gold = row.text("answer").rpartition("#### ")[2].strip().replace(",", "")
    if extraction.value(gold) is None:
        raise row.error(f"a number after '#### ' at the end of 'answer', found {gold!r}")
    question = row.text("question")
    prompt = "".join(map(solved, shots)) + f"Question: {question}{STEPS}"
    return Example(id=f"test/{index}", prompt=prompt, chat=question, target=gold)


def read(folder: Path) -> Iterator[Example]:
    """The questions of the test file."""
    train = folder / "train.jsonl"
    rows = first_rows(train, json_rows(train), max(SHOTS) + 1)
    shots = [rows[place] for place in SHOTS]
    for index, row in enumerate(json_rows(folder / "test.jsonl")):
        yield example(row, shots, index)


def from_tfds(split: Callable[[str], Iterator[dict]]) -> Iterator[Example]:
    """The questions of TFDS' test split."""
    found = {digest(row.text("question")): row for row in numbered(split("train"), "gsm8k of TFDS, train")}
    if missing := [mark for mark in SHOTS.values() if mark not in found]:
        raise ValueError(f"TFDS gsm8k: {len(missing)} of the {len(SHOTS)} worked examples are not in its train split")
    shots = [found[mark] for mark in SHOTS.values()]
    for index, row in enumerate(numbered(split("test"), "gsm8k of TFDS, test")):
        yield example(row, shots, index)


def same_number(answer: str, example: Example) -> bool:
    """Whether two numbers are equal."""
    return extraction.value(answer) == extraction.value(example.target)


STOP = ("\n\n", "Question:")
GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    folder="gsm8k",
    files="test.jsonl and train.jsonl",
    shots=len(SHOTS),
    read=read,
    answers=Generation(
        max_new_tokens=512,
        stop=STOP,
        extract={
            "number": lambda text, _: extraction.last_number(extraction.cut(text, STOP)),
            "released": lambda text, _: extraction.last_digits(extraction.cut(text, STOP)),
        },
        chat_extract={
            "number": lambda text, _: extraction.last_number(extraction.without_thinking(text)),
            "released": lambda text, _: extraction.last_digits(extraction.without_thinking(text)),
        },
        judge=same_number,
    ),
    tfds=TfdsSet(name="gsm8k:1.0.0", read=from_tfds),
    table="Table 2",
    report={
        "Qwen-1.8B": 21.2,
        "Qwen-7B": 51.7,
        "Qwen-14B": 61.3,
        "Math-Qwen-7B-Chat": 62.5,
        "Math-Qwen-14B-Chat": 69.8,
    },
    source="openai/grade-school-math; QwenLM/Qwen eval/evaluate_gsm8k.py, gsm8k_prompt.txt, evaluate_chat_gsm8k.py",
    size=1319,
)
add_benchmark(GSM8K, benchmark_files)
