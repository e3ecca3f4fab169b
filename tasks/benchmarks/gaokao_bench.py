"""GAOKAO-Bench (Zhang et al. 2023): objective questions of the Chinese college entrance examination, without shots.

Files as in the publisher's repository: `Data/Objective_Questions/KEYWORD.json`, with the prompts and kinds of question
of `Bench/Obj_Prompt.json`. As in OpenCompass' GaokaoBench_mixed_9af5ee, with which the report's table was made, base
models rank the letters of questions with one answer, and write the others in at most 1,024 tokens. Letters are found in
texts, and points given, as by its GaokaoBenchEvaluator and the publisher's OBJ_score_evaluation.py: a question is worth
its points for each of its parts; in physics a part of the right letters earns half. The subjects are groups. The
prompts are the publisher's for chat models, too. Subjective questions need a human or model judge and are not read.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_items
from tasks.data_dir import benchmark_files

LETTERS = "ABCD"
SINGLE, MULTIPLE, PARTS, SEVEN = "single_choice", "multi_choice", "multi_question_choice", "five_out_of_seven"
GROUPS = {
    "English": (
        "2010-2013_English_MCQs 2010-2022_English_Fill_in_Blanks 2010-2022_English_Reading_Comp "
        "2012-2022_English_Cloze_Test"
    ).split(),
    "Math": "2010-2022_Math_I_MCQs 2010-2022_Math_II_MCQs".split(),
    "Chinese": "2010-2022_Chinese_Lang_and_Usage_MCQs 2010-2022_Chinese_Modern_Lit".split(),
    "Physics": ["2010-2022_Physics_MCQs"],
    "Chemistry": ["2010-2022_Chemistry_MCQs"],
    "Biology": ["2010-2022_Biology_MCQs"],
    "History": ["2010-2022_History_MCQs"],
    "Geography": ["2010-2022_Geography_MCQs"],
    "Politics": ["2010-2022_Political_Science_MCQs"],
}


def letters(text: str, example: Example) -> list[str] | int | None:
    """The letters that a text gives as answers, one for each part; the index of the letter where it is one of A to D.

    None: the text has none.
    """
    kind, parts, text = example.extra["kind"], len(example.extra["answer"]), extraction.without_thinking(text)
    if kind == SINGLE:
        found = re.findall(f"[{LETTERS}]", text)
        return LETTERS.index(found[-1]) if found else None
    if kind == MULTIPLE:
        text = "".join(text.split())
        place = text.find("【答案】")
        found = re.findall(f"[{LETTERS}]", text[place:] if place > 0 else text[-10:])
        return ["".join(found)] if found else None
    if kind == SEVEN:
        return re.findall("[A-G]", text)[:5] or None
    marked = re.findall(r"【答案】\s*[:：]*\s*([A-Z])", text)
    return (marked if len(marked) == parts else re.findall("[A-Z]", text)[:parts]) or None


def share(found: list[str] | int, example: Example) -> float:
    """Share of the points that letters earn."""
    answer, kind = example.extra["answer"], example.extra["kind"]
    if kind == SINGLE:
        return float(found == example.target)
    if len(found) != len(answer):
        return 0.0
    partial = 0.5 if kind == MULTIPLE else 0.0
    parts = [
        1.0 if one == right else partial * (set(one) <= set(right)) for one, right in zip(found, answer, strict=True)
    ]
    return sum(parts) / len(parts)


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions of the objective files that are there."""
    prompts = {row.text("keyword"): row for row in json_items(folder / "Bench/Obj_Prompt.json", "examples")}
    for subject in (one for group in GROUPS.values() for one in group):
        file = folder / f"Data/Objective_Questions/{subject}.json"
        if not file.is_file():
            yield LeftOut(where=str(file), reason="no file of this subject")
            continue
        if subject not in prompts:
            raise ValueError(f"{folder / 'Bench/Obj_Prompt.json'}: expected a prompt with the keyword {subject}")
        kind = prompts[subject].one_of("type", (SINGLE, MULTIPLE, PARTS, SEVEN))
        for row in json_items(file, "example"):
            answer = row.texts("answer", 1 if kind in (SINGLE, MULTIPLE) else None)
            if not answer or not all(re.fullmatch("[A-D]+" if kind == MULTIPLE else "[A-G]", one) for one in answer):
                raise row.error(f"letters in 'answer', found {answer}")
            prompt = prompts[subject].text("prefix_prompt") + row.text("question")
            yield Example(
                id=f"{subject}/{row.get('index', int)}",
                subject=subject,
                prompt=f"{prompt}\n" if kind == SINGLE else prompt,
                choices=tuple(f"【答案】{letter} <eoa>" for letter in LETTERS) if kind == SINGLE else (),
                target=LETTERS.index(answer[0]) if kind == SINGLE else answer,
                chat=prompt,
                extra={"kind": kind, "answer": answer},
                weight=float(row.get("score", (int, float))) * len(answer),
            )


GAOKAO_BENCH = Benchmark(
    name="gaokao_bench",
    title="Gaokao-Bench",
    folder="gaokao_bench",
    files="Data/Objective_Questions/KEYWORD.json and Bench/Obj_Prompt.json",
    shots=0,
    read=read,
    answers=Choices(),
    written=Generation(max_new_tokens=1024, extract={"choice": letters}, judge=share),
    groups=GROUPS,
    table="Table 15",
    source="OpenLMLab/GAOKAO-Bench; OpenCompass GaokaoBench_mixed_9af5ee",
    size=1781,
)
add_benchmark(GAOKAO_BENCH, benchmark_files)
