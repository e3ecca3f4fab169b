"""Math23K (Wang et al. 2017): Chinese word problems of elementary school, without shots.

File of the publisher: `math23k_test.json`, pretty-printed objects one after the other, or one JSON array as others
ship it; fields `id`, `original_text`, `equation` and `ans` ("14.4", "10%", "((3)/(4))", "5((7)/(10))"). A chat model
gets the bare problem, a base model the problem between 问题 and 答案 as in the released C-Eval script. The report says
no more than that it decodes greedily. Answers are compared as mathematics.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction, mathematics
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_objects
from tasks.data_dir import benchmark_files


def gold(answer: str) -> str | None:
    """The answer as a number, fraction or mixed number that `mathematics` reads; None: it is none of these."""
    if found := re.fullmatch(r"(\d*)\(\(?(\d+)\)?/\(?(\d+)\)?\)", answer):
        return f"{found[1]} {found[2]}/{found[3]}".strip()
    return answer if re.fullmatch(r"-?\d+(\.\d+)?(/\d+)?%?", answer) else None


def read(folder: Path) -> Iterator[Example]:
    """The test problems."""
    for row in json_objects(folder / "math23k_test.json"):
        target = gold(row.text("ans").strip())
        if target is None:
            raise row.error(f"a number, per cent or fraction in 'ans', found {row.fields['ans']!r}")
        text = row.text("original_text")
        yield Example(id=row.text("id"), prompt=f"问题：{text}\n答案：", chat=text, target=target)


STOP = ("问题：",)
MATH23K = Benchmark(
    name="math23k",
    title="Math23K",
    folder="math23k",
    files="math23k_test.json",
    shots=0,
    read=read,
    answers=Generation(
        max_new_tokens=512,
        stop=STOP,
        extract={"answer": lambda text, _: extraction.mathematical(extraction.without_thinking(text, STOP))},
        # A chat model writes one solution, which may begin by repeating the problem under its heading.
        chat_extract={"answer": lambda text, _: extraction.mathematical(text)},
        judge=lambda answer, example: mathematics.same(answer, example.target),
    ),
    table="Table 12",
    report={"Math-Qwen-7B-Chat": 75.4, "Math-Qwen-14B-Chat": 78.4},
    source="Math23K of Tencent AI Lab (test file of SCNU203/Math23k)",
    size=1000,
)
add_benchmark(MATH23K, benchmark_files)
