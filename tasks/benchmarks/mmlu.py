"""MMLU (Hendrycks et al. 2021): 57 subjects of four choices, five shots from each subject's dev file.

Files as in the publisher's archive: `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, no header, columns question,
A, B, C, D, answer. Header, layout of a question and ids of " A" to " D" as in evaluate_mmlu.py of the released code;
micro average, and by the publisher's four groups.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from tasks.data_dir import benchmark_files

LETTERS = "ABCD"


def question(row: list[str], where: str, answer: str | None) -> str:
    """One question, with its answer or ready for one.

    Raises:
        ValueError: the row does not have six columns with a letter at the end; `where` names it.
    """
    if len(row) != 6 or row[5] not in LETTERS:
        raise ValueError(f"{where}: expected question, A, B, C, D and a letter A to D, found {len(row)} columns")
    lines = [f"Question: {row[0]}", *(f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))]
    return "\n".join([*lines, f"Answer: {answer}\n\n" if answer else "Answer:"])


def read(folder: Path) -> Iterator[Example]:
    """All questions of the test files, by subject."""
    files = sorted((folder / "test").glob("*_test.csv"))
    if not files:
        raise FileNotFoundError(f"{folder / 'test'}: no SUBJECT_test.csv; expected {MMLU.files}")
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        shots = _rows(folder / "dev" / f"{subject}_dev.csv")[: MMLU.shots]
        header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        header += "".join(question(row, where, row[-1]) for where, row in shots)
        for index, (where, row) in enumerate(_rows(file)):
            yield Example(
                id=f"{subject}/{index}",
                subject=subject,
                prompt=header + question(row, where, None),
                choices=tuple(f" {letter}" for letter in LETTERS),
                target=LETTERS.index(row[5]),
            )


def _rows(file: Path) -> list[tuple[str, list[str]]]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        return [(f"{file}: row {index}", row) for index, row in enumerate(csv.reader(lines), 1)]


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    folder="mmlu",
    files="dev/SUBJECT_dev.csv and test/SUBJECT_test.csv",
    shots=5,
    read=read,
    answers=Choices(),
    table="Table 2",
    report={"Qwen-1.8B": 44.6, "Qwen-7B": 58.2, "Qwen-14B": 66.3},
    source="hendrycks/test; QwenLM/Qwen eval/evaluate_mmlu.py",
)
add_benchmark(MMLU, benchmark_files)
