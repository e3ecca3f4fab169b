"""Texts that benchmarks rank, to the letter, and what a shot looks like."""

import pytest

import tasks  # noqa: F401
from qwen_jax.evaluation.benchmark_tasks import benchmarks, read_examples
from tests.evaluation.published import FILES

# Name: (end of the first prompt, its last choice).
ENDS = {
    "mmlu": ('Question: anatomy 0, which one?\nA. one\nB. two\nC. three, or "3"\nD. four\nand more\nAnswer:', " D"),
    "ceval": ('问题：college_physics 0, which one?\nA. one\nB. two\nC. three, or "3"\nD. four\nand more\n答案：', "D"),
    "cmmlu": ('问题：test 0, which one?\nA. one\nB. two\nC. three, or "3"\nD. four\nand more\n答案：', "D"),
    "arc_easy": ("Question: What is 0?\nAnswer: \n", "matter D"),
    "arc_challenge": ("Question: What is 0?\nAnswer: \n", "matter D"),
    "boolq": ("Coal -- Coal is a black rock. It burns.\nQuestion: is coal black?\n", "Yes"),
    "commonsenseqa": ("Answer: \nplace C\n\n\n\n\nQuestion: Where is dev 0?\nAnswer: \n", "place E"),
    "hellaswag": ("A boat lies in the harbor. The sailor\n", "goes to place 3. Rests."),
    "piqa": ("The following makes sense: \nQ: open jar 0\nA: ", "turn the table \n"),
    "siqa": ("Kim lent 0 books to Lee.\nQuestion: Why?\nAnswer:\n", "to sleep"),
    "ocnli": ("语句一：“今天第0次下雨”\n语句二：“地是湿的”\n请问这两句话是什么关系？\n", "无关"),
    "gaokao_bench": ("请你做一道题\n第0题 A．一 B．二\n", "【答案】D <eoa>"),
}


@pytest.fixture
def examples(tmp_path):
    def read(name):
        folder = tmp_path / benchmarks()[name].folder
        folder.mkdir()
        FILES[name].write(folder)
        return list(read_examples(benchmarks()[name], tmp_path))

    return read


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_prompt_and_a_choice(name, examples):
    end, choice = ENDS[name]
    first = next(example for example in examples(name) if example.choices)
    assert first.prompt.endswith(end) and first.choices[-1] == choice


def test_shots_of_mmlu_are_solved_and_ceval_has_no_header(examples):
    first = examples("mmlu")[0]
    assert first.prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nQuestion: solved anatomy 0, "
        'which one?\nA. one\nB. two\nC. three, or "3"\nD. four\nand more\nAnswer: A\n\nQuestion: solved anatomy 1'
    )
    assert examples("ceval")[0].prompt.startswith("问题：已解college_physics 0, which one?\nA. one\n")


def test_shots_of_commonsenseqa_are_the_first_of_the_training_file(examples):
    prompt = examples("commonsenseqa")[0].prompt
    assert prompt.startswith(
        "Question: Where is train 0?\nAnswer: \nplace A\n\n\nQuestion: Where is train 1?\nAnswer: \n"
    )
    assert "train 7" in prompt and "train 8" not in prompt


def test_chat_prompts_are_those_of_the_released_scripts(examples):
    options = 'A. one\nB. two\nC. three, or "3"\nD. four\nand more\n'
    assert examples("mmlu")[0].chat == (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        f"answer to this question.\n\nanatomy 0, which one?\n{options}"
    )
    assert examples("ceval")[0].chat == f"college_physics 0, which one?\n\n{options}"


def test_marks_of_wikihow_go_and_the_first_two_colons_end_the_label(examples):
    assert examples("hellaswag")[1].prompt == "Choose a bed. Dig it over Use a spade.\n"


def test_points_weigh_parts_of_gaokao_bench(examples):
    weights = {example.subject: example.weight for example in examples("gaokao_bench")}
    assert weights == {
        "2010-2022_Math_I_MCQs": 5,
        "2010-2022_Physics_MCQs": 6,
        "2010-2022_Geography_MCQs": 12,
        "2012-2022_English_Cloze_Test": 10,
    }


def test_a_benchmark_has_the_groups_of_its_publisher():
    sizes = {
        name: {group: len(subjects) for group, subjects in benchmarks()[name].groups.items()}
        for name in ("mmlu", "ceval", "cmmlu")
    }
    assert sizes == {
        "mmlu": {"STEM": 19, "Humanities": 13, "Social Science": 12, "Other": 13},
        "ceval": {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11, "Hard": 8},
        "cmmlu": {"STEM": 17, "Humanities": 13, "Social Science": 22, "Other": 15, "China specific": 15},
    }
