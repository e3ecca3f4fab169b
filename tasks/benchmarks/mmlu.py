"""MMLU (Hendrycks et al. 2021): 57 subjects of four choices, five shots from each subject's dev file.

Files as in the publisher's archive: `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, no header, columns question,
A, B, C, D, answer. Header, layout of a question and ids of " A" to " D" as in evaluate_mmlu.py of the released code,
but that a text such as "None" stays as published (there pandas makes "nan" of it). Micro average over the questions,
and over those of each of that script's four groups; the publisher's categories.py (hendrycks/test) has anatomy under
Other, not STEM. Chat models answer the question without shots (evaluate_chat_mmlu.py). TFDS has no MMLU.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.option_letters import english_option, is_target
from qwen_jax.evaluation.rows import Row, csv_rows
from qwen_jax.evaluation.subjects import Subjects
from tasks.data_dir import benchmark_files

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")
CHAT = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the answer"
    " to this question.\n\n"
)
GROUPS = {
    "STEM": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ).split(),
    "Humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ).split(),
    "Social Science": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ).split(),
    "Other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ).split(),
}
SUBJECTS = Subjects(
    shots="dev/{}_dev.csv",
    questions="test/{}_test.csv",
    names=[subject for group in GROUPS.values() for subject in group],
    rows=lambda file: csv_rows(file, COLUMNS, header=False),
)


def question(row: Row, answer: bool) -> str:
    """One question, with its answer or ready for one.

    Raises:
        ValueError: a field is blank, or the answer no letter A to D.
    """
    letter = row.one_of("answer", LETTERS)
    lines = [f"Question: {row.text('question')}", *(f"{option}. {row.text(option)}" for option in LETTERS)]
    return "\n".join([*lines, f"Answer: {letter}\n\n" if answer else "Answer:"])


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """All questions of the test files, by subject."""
    yield from SUBJECTS.missing(folder)
    for subject, shots, rows in SUBJECTS.read(folder, MMLU.shots):
        header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        header += "".join(question(row, True) for row in shots)
        for index, row in enumerate(rows):
            prompt = question(row, False)
            yield Example(
                id=f"{subject}/{index}",
                subject=subject,
                prompt=header + prompt,
                choices=tuple(f" {letter}" for letter in LETTERS),
                target=LETTERS.index(row.fields["answer"]),
                chat=CHAT + prompt.removeprefix("Question: ").removesuffix("Answer:"),
                extra={"options": [row.fields[letter] for letter in LETTERS]},
            )


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    folder="mmlu",
    files="dev/SUBJECT_dev.csv and test/SUBJECT_test.csv",
    shots=5,
    read=read,
    answers=Choices(),
    written=Generation(max_new_tokens=512, extract={"choice": english_option}, judge=is_target),
    groups=GROUPS,
    table="Table 2",
    report={"Qwen-1.8B": 44.6, "Qwen-7B": 58.2, "Qwen-14B": 66.3},
    source="hendrycks/test; QwenLM/Qwen eval/evaluate_mmlu.py, eval/evaluate_chat_mmlu.py",
    size=14042,
)
add_benchmark(MMLU, benchmark_files)
