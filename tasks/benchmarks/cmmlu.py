"""CMMLU (Li et al. 2023): 67 Chinese subjects of four choices, five shots from each subject's dev file.

Files as in the publisher's repository or archive: `dev/SUBJECT.csv` and `test/SUBJECT.csv`, perhaps under `data/`, with
the columns "", Question, A, B, C, D, Answer. Layout of a question and ids of "A" to "D" without a blank as in
evaluate_cmmlu.py of the released code. Macro average over subjects, and over those of each of the publisher's five
groups (src/categories.py), of which "China specific" overlaps the others. TFDS has no CMMLU.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, csv_rows
from qwen_jax.evaluation.subjects import Subjects
from tasks.data_dir import benchmark_files

LETTERS = "ABCD"
GROUPS = {
    "STEM": (
        "anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics "
        "college_medical_statistics computer_science conceptual_physics electrical_engineering elementary_mathematics "
        "genetics high_school_biology high_school_chemistry high_school_mathematics high_school_physics "
        "machine_learning virology"
    ).split(),
    "Humanities": (
        "arts chinese_history chinese_literature college_law global_facts international_law jurisprudence logical "
        "marxist_theory philosophy professional_law world_history world_religions"
    ).split(),
    "Social Science": (
        "ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture chinese_foreign_policy "
        "chinese_teacher_qualification college_education economics education elementary_chinese ethnology "
        "high_school_geography high_school_politics journalism management marketing modern_chinese "
        "professional_accounting professional_psychology public_relations security_study sociology"
    ).split(),
    "Other": (
        "agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security "
        "construction_project_management elementary_commonsense elementary_information_and_technology food_science "
        "human_sexuality legal_and_moral_basis nutrition professional_medicine sports_science "
        "traditional_chinese_medicine"
    ).split(),
    "China specific": (
        "ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture chinese_foreign_policy "
        "chinese_history chinese_literature chinese_teacher_qualification construction_project_management "
        "elementary_chinese elementary_commonsense ethnology high_school_politics modern_chinese "
        "traditional_chinese_medicine"
    ).split(),
}
SUBJECTS = Subjects(
    shots="dev/{}.csv",
    questions="test/{}.csv",
    names=sorted({subject for group in GROUPS.values() for subject in group}),
    rows=lambda file: csv_rows(file, ("Question", *LETTERS, "Answer")),
)


def question(row: Row, answer: bool) -> str:
    """One question, with its answer or ready for one.

    Raises:
        ValueError: a field is blank, or the answer no letter A to D.
    """
    letter = row.one_of("Answer", LETTERS)
    lines = [f"问题：{row.text('Question')}", *(f"{option}. {row.text(option)}" for option in LETTERS)]
    return "\n".join([*lines, f"答案：{letter}\n\n" if answer else "答案："])


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """All questions of the test files, by subject."""
    folder = folder / "data" if (folder / "data").is_dir() else folder
    yield from SUBJECTS.missing(folder)
    for subject, shots, rows in SUBJECTS.read(folder, CMMLU.shots):
        header = "".join(question(row, True) for row in shots)
        for index, row in enumerate(rows):
            yield Example(
                id=f"{subject}/{index}",
                subject=subject,
                prompt=header + question(row, False),
                choices=tuple(LETTERS),
                target=LETTERS.index(row.fields["Answer"]),
            )


CMMLU = Benchmark(
    name="cmmlu",
    title="CMMLU",
    folder="cmmlu",
    files="dev/SUBJECT.csv and test/SUBJECT.csv",
    shots=5,
    read=read,
    answers=Choices(apart=True),
    groups=GROUPS,
    average="subjects",
    table="Table 15",
    source="haonan-li/CMMLU; QwenLM/Qwen eval/evaluate_cmmlu.py",
    size=11582,
)
add_benchmark(CMMLU, benchmark_files)
