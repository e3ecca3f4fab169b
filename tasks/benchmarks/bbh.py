"""BIG-Bench Hard (Suzgun et al. 2022): 27 tasks, three worked examples of each.

Files of the publisher: `bbh/TASK.json` with `examples` of `input` and `target`, and `cot-prompts/TASK.txt`, whose first
two lines are no part of the prompt. A question follows as the examples stand there. What follows the first "the answer
is" must be the target, without the full stop: extraction `exact`. Extraction `opencompass` also takes an option's
letter from its text, as OpenCompass' bbh_gen_5b92b0, whose prompt and limit of 512 tokens chat models get here too. The
average is that over tasks.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_items
from tasks.data_dir import benchmark_files

SHOTS = 3
QUESTION = "\n\nQ: {}\nA: Let's think step by step.\n"
TASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()


def exact(text: str, example: Example) -> str | None:
    """What follows the first "the answer is", to the end of the line and without its full stop."""
    text = extraction.without_thinking(text)
    answer = text.partition("the answer is ")[2].split("\n")[0].strip()
    return answer.removesuffix(".").strip() or None


def opencompass(text: str, example: Example) -> str | None:
    """As `exact`; of options, the first letter in brackets, else the first capital."""
    if not re.fullmatch(r"\([A-Z]\)", example.target):
        return exact(text, example)
    text = extraction.without_thinking(text)
    answer = text.partition("answer is ")[2].strip() or text
    found = re.search(r"\(([A-Z])\)*", answer) or re.search("([A-Z])", answer)
    return f"({found[1]})" if found else None


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions of all tasks whose file is there."""
    for task in TASKS:
        file = folder / f"bbh/{task}.json"
        if not file.is_file():
            yield LeftOut(where=str(file), reason="no file of this task")
            continue
        prompts = folder / f"cot-prompts/{task}.txt"
        header = prompts.read_text(encoding="utf-8").partition("-----\n")[2].strip()
        if header.count("\n\nQ: ") != SHOTS:
            raise ValueError(f"{prompts}: expected {SHOTS} worked examples after a line '-----': is the file cut?")
        for index, row in enumerate(json_items(file, "examples")):
            prompt = header + QUESTION.format(row.text("input"))
            chat = f"Follow the given examples and answer the question.\n{prompt.rstrip()}"
            target = row.text("target").strip()
            yield Example(id=f"{task}/{index}", subject=task, prompt=prompt, chat=chat, target=target)


BBH = Benchmark(
    name="bbh",
    title="BBH",
    folder="bbh",
    files="bbh/TASK.json and cot-prompts/TASK.txt",
    shots=SHOTS,
    read=read,
    answers=Generation(
        max_new_tokens=512,
        stop=("\n\nQ:",),
        extract={"exact": exact, "opencompass": opencompass},
        judge=lambda answer, example: answer == example.target,
    ),
    average="subjects",
    table="Table 2",
    report={"Qwen-1.8B": 28.2, "Qwen-7B": 45.0, "Qwen-14B": 53.4},
    source="suzgunmirac/BIG-Bench-Hard; OpenCompass bbh_gen_5b92b0 for chat models",
    size=6511,
)
add_benchmark(BBH, benchmark_files)
