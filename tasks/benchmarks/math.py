r"""MATH (Hendrycks et al. 2021): competition problems of seven subjects, with four worked examples.

The data are read from a path and never shipped, since its host took them down. Files: the publisher's folders
`test/SUBJECT/NUMBER.json`, or one `test.jsonl`; each problem has `problem` and `solution`, perhaps `level`, `type` (or
`subject`) and `answer`; without `answer`, the gold answer is the last \boxed of the solution. `solved.jsonl` holds the
four examples of Minerva's prompt (Lewkowycz et al. 2022, appendix D) as `problem` and `solution`, which are problems of
MATH too: with lm-eval installed, `lm_eval.tasks.minerva_math.utils.list_fewshot_samples()` returns them. Layout and
stop string as in lm-evaluation-harness 0.4.13's minerva_math; at most 512 tokens as in OpenCompass' math_gen_265cce.
Answers are compared as mathematics. A chat model gets the bare problem; the report does not give its prompt.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction, mathematics
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, first_rows, json_object, json_rows
from tasks.data_dir import benchmark_files

SHOTS = 4
FILES = "test/SUBJECT/NUMBER.json or test.jsonl, and solved.jsonl with four worked examples"


def example(row: Row, name: str, header: str) -> Example:
    r"""The example of a problem.

    Raises:
        ValueError: the row is not as published, or has neither an answer nor a \boxed one in its solution.
    """
    subject = row.fields.get("type", row.fields.get("subject", ""))
    gold = row.fields.get("answer") or extraction.boxed(row.text("solution"))
    if not isinstance(gold, str) or not isinstance(subject, str):
        raise row.error(r"a text 'answer', or a whole \boxed{…} in 'solution', and a text 'type'")
    problem = row.text("problem")
    extra = {"level": str(row.fields.get("level", ""))}
    prompt = f"{header}Problem:\n{problem}\n\nSolution:"
    return Example(id=name, prompt=prompt, chat=problem, target=gold, subject=subject, extra=extra)


def read(folder: Path) -> Iterator[Example]:
    """The test problems, in the order of names or lines."""
    file = folder / "solved.jsonl"
    header = "".join(
        f"Problem:\n{row.text('problem')}\n\nSolution: {row.text('solution')}\n\n"
        for row in first_rows(file, json_rows(file), SHOTS)
    )
    if (folder / "test").is_dir():
        files = sorted(folder.glob("test/*/*.json"), key=lambda file: (file.parent.name, len(file.stem), file.stem))
        if not files:
            raise FileNotFoundError(2, "no such file", str(folder / "test/SUBJECT/NUMBER.json"))
        for file in files:
            yield example(json_object(file), f"{file.parent.name}/{file.stem}", header)
    else:
        for index, row in enumerate(json_rows(folder / "test.jsonl")):
            yield example(row, f"test/{index}", header)


STOP = ("Problem:",)
ANSWERS = Generation(
    max_new_tokens=512,
    stop=STOP,
    extract={"answer": lambda text, _: extraction.mathematical(extraction.without_thinking(text, STOP))},
    # A chat model writes one solution, which may begin by repeating the problem under its heading.
    chat_extract={"answer": lambda text, _: extraction.mathematical(text)},
    judge=lambda answer, example: mathematics.same(answer, example.target),
)
MATH = Benchmark(
    name="math",
    title="MATH",
    folder="math",
    files=FILES,
    shots=SHOTS,
    read=read,
    answers=ANSWERS,
    table="Table 2",
    report={"Qwen-1.8B": 5.6, "Qwen-7B": 11.6, "Qwen-14B": 24.8},
    source="hendrycks/math; prompt of Minerva, arXiv 2206.14858; lm-evaluation-harness minerva_math",
    size=5000,
)
add_benchmark(MATH, benchmark_files)
