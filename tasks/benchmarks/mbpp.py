"""MBPP (Austin et al. 2021): Python functions from a sentence and three tests, with three solved examples.

File of the publisher: `mbpp.jsonl`, which holds all splits. Test problems are those of task ids 11 to 510, the solved
ones 2, 3 and 4; the others are left out. The prompt is the paper's, as lm-evaluation-harness 0.4.13 has it, with the
code between [BEGIN] and [DONE]; at most 512 tokens as in OpenCompass' mbpp_gen_1e1056, whose layout of the examples
differs. A chat model gets the question without examples. The tests run in the sandbox; pass@1 of greedy decoding.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction, programs
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows
from tasks.data_dir import benchmark_files

SOLVED = (2, 3, 4)
TEST = range(11, 511)


def question(row: Row) -> str:
    """A problem with its tests."""
    tests = "\n".join(row.texts("test_list"))
    task = f"You are an expert Python programmer, and here is your task: {row.text('text')}"
    return f"{task} Your code should pass these tests:\n\n{tests}\n"


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The test problems, in the order of the file."""
    file = folder / "mbpp.jsonl"
    rows = {row.get("task_id", int): row for row in json_rows(file)}
    if missing := [number for number in SOLVED if number not in rows]:
        raise ValueError(f"{file}: no task {missing[0]}, which is a solved example: is the file cut?")
    solved = [f"{question(rows[number])}[BEGIN]\n{rows[number].text('code')}\n[DONE]\n\n" for number in SOLVED]
    for number, row in rows.items():
        if number not in TEST:
            yield LeftOut(where=row.where, reason="of another split than test")
            continue
        yield Example(
            id=f"mbpp/{number}",
            prompt="".join(solved) + f"{question(row)}[BEGIN]\n",
            chat=question(row),
            target=row.text("code"),
            extra={"code": row.text("code"), "test_list": row.texts("test_list")}
            | {"test_setup_code": row.get("test_setup_code", str)},
        )


MBPP = Benchmark(
    name="mbpp",
    title="MBPP",
    folder="mbpp",
    files="mbpp.jsonl",
    shots=len(SOLVED),
    read=read,
    answers=Generation(
        max_new_tokens=512,
        stop=("[DONE]",),
        extract={"code": lambda text, example: programs.mbpp_answer(example.extra, extraction.without_thinking(text))},
        judge=lambda solution, example: programs.judge_mbpp(example.extra, solution).correct,
    ),
    table="Table 2",
    report={
        "Qwen-1.8B": 14.8,
        "Qwen-7B": 31.6,
        "Qwen-14B": 40.8,
        "Code-Qwen-7B": 41.8,
        "Code-Qwen-14B": 51.4,
        "Code-Qwen-7B-Chat": 44.2,
        "Code-Qwen-14B-Chat": 52.4,
    },
    source="google-research/mbpp; prompt of lm-evaluation-harness mbpp, limit of OpenCompass mbpp_gen_1e1056",
    size=500,
)
add_benchmark(MBPP, benchmark_files)
