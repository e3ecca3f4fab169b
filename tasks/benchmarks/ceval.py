"""C-Eval (Huang et al. 2023): 52 Chinese subjects of four choices, five shots from each subject's dev file.

Files as in the publisher's ceval-exam.zip: `dev/SUBJECT_dev.csv` and `val/SUBJECT_val.csv` with the columns id,
question, A, B, C, D, answer; the answers of `test/` are not public. Layout of a question and ids of "A" to "D" without
a blank as in evaluate_ceval.py of the released code; no header. Macro average over subjects, the four groups of the
publisher's subject_mapping.json, and the eight hard subjects. Chat models answer the question without shots
(evaluate_chat_ceval.py). TFDS has no C-Eval.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.option_letters import chinese_option, is_target
from qwen_jax.evaluation.rows import Row, csv_rows
from qwen_jax.evaluation.subjects import Subjects
from tasks.data_dir import benchmark_files

LETTERS = "ABCD"
GROUPS = {
    "STEM": (
        "advanced_mathematics college_chemistry college_physics college_programming computer_architecture "
        "computer_network discrete_mathematics electrical_engineer high_school_biology high_school_chemistry "
        "high_school_mathematics high_school_physics metrology_engineer middle_school_biology middle_school_chemistry "
        "middle_school_mathematics middle_school_physics operating_system probability_and_statistics "
        "veterinary_medicine"
    ).split(),
    "Social Science": (
        "business_administration college_economics education_science high_school_geography high_school_politics "
        "mao_zedong_thought marxism middle_school_geography middle_school_politics teacher_qualification"
    ).split(),
    "Humanities": (
        "art_studies chinese_language_and_literature high_school_chinese high_school_history "
        "ideological_and_moral_cultivation law legal_professional logic middle_school_history modern_chinese_history "
        "professional_tour_guide"
    ).split(),
    "Other": (
        "accountant basic_medicine civil_servant clinical_medicine environmental_impact_assessment_engineer "
        "fire_engineer physician plant_protection sports_science tax_accountant urban_and_rural_planner"
    ).split(),
}
HARD = (
    "advanced_mathematics discrete_mathematics probability_and_statistics college_physics college_chemistry "
    "high_school_mathematics high_school_physics high_school_chemistry"
).split()
SUBJECTS = Subjects(
    shots="dev/{}_dev.csv",
    questions="val/{}_val.csv",
    names=[subject for group in GROUPS.values() for subject in group],
    rows=lambda file: csv_rows(file, ("question", *LETTERS, "answer")),
)


def question(row: Row, answer: bool) -> str:
    """One question, with its answer or ready for one.

    Raises:
        ValueError: a field is blank, or the answer no letter A to D.
    """
    letter = row.one_of("answer", LETTERS)
    lines = [f"问题：{row.text('question')}", *(f"{option}. {row.text(option)}" for option in LETTERS)]
    return "\n".join([*lines, f"答案：{letter}\n\n" if answer else "答案："])


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """All questions of the val files, by subject."""
    yield from SUBJECTS.missing(folder)
    for subject, shots, rows in SUBJECTS.read(folder, CEVAL.shots):
        header = "".join(question(row, True) for row in shots)
        for index, row in enumerate(rows):
            options = [row.text(letter) for letter in LETTERS]
            lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, options, strict=True))
            yield Example(
                id=f"{subject}/{index}",
                subject=subject,
                prompt=header + question(row, False),
                choices=tuple(LETTERS),
                target=LETTERS.index(row.fields["answer"]),
                chat=f"{row.fields['question']}\n\n{lines}",
                extra={"question": row.fields["question"], "options": options},
            )


CEVAL = Benchmark(
    name="ceval",
    title="C-Eval",
    folder="ceval",
    files="dev/SUBJECT_dev.csv and val/SUBJECT_val.csv",
    shots=5,
    read=read,
    answers=Choices(apart=True),
    written=Generation(max_new_tokens=512, extract={"choice": chinese_option}, judge=is_target),
    groups=GROUPS | {"Hard": HARD},
    average="subjects",
    table="Table 2",
    report={"Qwen-1.8B": 54.7, "Qwen-7B": 63.5, "Qwen-14B": 72.1},
    source="hkust-nlp/ceval; QwenLM/Qwen eval/evaluate_ceval.py, eval/evaluate_chat_ceval.py",
    size=1346,
)
add_benchmark(CEVAL, benchmark_files)
