"""Benchmarks whose choices are ranked."""

from pathlib import Path

from tests.evaluation.published import Published, write_csv, write_json, write_json_lines

LETTERS = "ABCD"


def _four(name: str, n: int) -> list[str]:
    return [f"{name} {n}, which one?", "one", "two", 'three, or "3"', "four\nand more", LETTERS[n % 4]]


def mmlu(folder: Path) -> None:
    for subject in ("anatomy", "world_religions"):
        write_csv(folder / "dev" / f"{subject}_dev.csv", [_four(f"solved {subject}", n) for n in range(5)])
        write_csv(folder / "test" / f"{subject}_test.csv", [_four(subject, n) for n in range(3)])


def ceval(folder: Path) -> None:
    header = ["id", "question", *LETTERS, "answer"]
    for subject in ("law", "logic", "college_physics"):
        solved = [[n, *_four(f"已解{subject}", n), "因为。"] for n in range(5)]
        write_csv(folder / "dev" / f"{subject}_dev.csv", [[*header, "explanation"], *solved])
        write_csv(folder / "val" / f"{subject}_val.csv", [header, *([n, *_four(subject, n)] for n in range(2))])


def cmmlu(folder: Path) -> None:
    header = ["", "Question", *LETTERS, "Answer"]
    for subject in ("arts", "chinese_history"):
        for split, rows in (("dev", 5), ("test", 3)):
            write_csv(
                folder / "data" / split / f"{subject}.csv", [header, *([n, *_four(split, n)] for n in range(rows))]
            )


def arc(name: str, folder: Path) -> None:
    def row(n: int, labels: str) -> dict:
        choices = [{"text": f"matter {label}", "label": label} for label in labels]
        return {
            "id": f"Mercury_{n}",
            "question": {"stem": f"What is {n}?", "choices": choices},
            "answerKey": labels[n % len(labels)],
        }

    rows = [row(n, labels) for n, labels in enumerate(("ABCD", "1234", "ABC", "ABCD", "ABCDE"))]
    write_json_lines(folder / "ARC-V1-Feb2018-2" / name / f"{name}-Dev.jsonl", rows)


def boolq(folder: Path) -> None:
    passage = "Coal -- Coal is a black rock. It burns."
    rows = [
        {"question": f"is coal {word}", "passage": passage, "idx": n, "label": label}
        for n, (word, label) in enumerate((("black", True), ("green", False), ("a rock", "true"), ("a fish", "false")))
    ]
    write_json_lines(folder / "SuperGLUE" / "BoolQ" / "val.jsonl", rows)


def commonsenseqa(folder: Path) -> None:
    def row(split: str, n: int) -> dict:
        choices = [{"label": letter, "text": f"place {letter}"} for letter in "ABCDE"]
        stem = f"Where is {split} {n}?"
        return {
            "answerKey": "ABCDE"[n % 5],
            "id": f"{split}{n}",
            "question": {"question_concept": "place", "choices": choices, "stem": stem},
        }

    write_json_lines(folder / "train_rand_split.jsonl", [row("train", n) for n in range(9)])
    write_json_lines(folder / "dev_rand_split.jsonl", [row("dev", n) for n in range(4)])


def hellaswag(folder: Path) -> None:
    scenes = [
        ("Sailing", "A boat lies in the harbor.", "the sailor"),
        ("Home and Garden", "How to sow: [header] Choose a bed [title] Dig it over [step] Use a spade.", ""),
        ("Baking", "A woman kneads dough.", "she"),
    ]
    rows = [
        {
            "ind": n,
            "activity_label": label,
            "ctx_a": before,
            "ctx_b": after,
            "ctx": f"{before} {after}".strip(),
            "split": "val",
            "split_type": "indomain",
            "label": n,
            "endings": [f"goes to place {place}. [substeps] Rests." for place in range(4)],
            "source_id": f"activitynet~v_{n}",
        }
        for n, (label, before, after) in enumerate(scenes)
    ]
    write_json_lines(folder / "data" / "hellaswag_val.jsonl", rows)


def piqa(folder: Path) -> None:
    rows = [{"goal": f"open jar {n}", "sol1": "turn the lid", "sol2": "turn the table "} for n in range(4)]
    write_json_lines(folder / "piqa" / "data" / "valid.jsonl", rows)
    (folder / "piqa" / "data" / "valid-labels.lst").write_text("0\n1\n1\n0\n")


def siqa(folder: Path) -> None:
    rows = [
        {"context": f"Kim lent {n} books to Lee.", "question": "Why?", "answerA": "to help", "answerB": "to eat"}
        | {"answerC": "to sleep"}
        for n in range(4)
    ]
    write_json_lines(folder / "socialiqa-train-dev" / "dev.jsonl", rows)
    (folder / "socialiqa-train-dev" / "dev-labels.lst").write_text("1\n2\n3\n1\n")


def ocnli(folder: Path) -> None:
    rows = [
        {
            "level": "easy",
            "sentence1": f"今天第{n}次下雨",
            "sentence2": "地是湿的",
            "label": label,
            "genre": "lit",
            "id": n,
        }
        for n, label in enumerate(("entailment", "neutral", "-", "contradiction"))
    ]
    write_json_lines(folder / "data" / "ocnli" / "dev.json", rows)


def gaokao_bench(folder: Path) -> None:
    kinds = {
        "2010-2022_Math_I_MCQs": ("single_choice", [["A"], ["D"]], 5),
        "2010-2022_Physics_MCQs": ("multi_choice", [["AC"], ["B"]], 6),
        "2010-2022_Geography_MCQs": ("multi_question_choice", [["A", "B", "C"]], 4),
        "2012-2022_English_Cloze_Test": ("five_out_of_seven", [["G", "A", "B", "C", "D"]], 2),
    }
    prompts = [
        {"type": kind, "keyword": name, "prefix_prompt": "请你做一道题\n"} for name, (kind, _, _) in kinds.items()
    ]
    write_json(folder / "Bench" / "Obj_Prompt.json", {"examples": prompts})
    for name, (_, answers, score) in kinds.items():
        rows = [
            {"year": "2010", "category": "（卷）", "question": f"第{n}题 A．一 B．二", "answer": answer}
            | {"analysis": "", "index": n, "score": score}
            for n, answer in enumerate(answers)
        ]
        write_json(folder / "Data" / "Objective_Questions" / f"{name}.json", {"keywords": name, "example": rows})


def agieval(folder: Path) -> None:
    def row(n: int, label, count: int, passage=None) -> dict:
        options = [f"({letter})option {letter}" for letter in "ABCDE"[:count]]
        return {"passage": passage, "question": f"Question {n}?", "options": options, "label": label, "answer": None}

    sets = {
        "lsat-ar": [row(0, "E", 5, "Eight people. "), row(1, "A", 5, "Nine people. ")],
        "gaokao-mathqa": [row(0, "C", 4), row(1, "A C", 4)],
        "gaokao-physics": [row(0, "B", 4), row(1, ["A", "D"], 4)],
        "jec-qa-kd": [row(0, ["A"], 4), row(1, [], 4)],
        "math": [
            {
                "passage": None,
                "question": "Question 0: half of 1?",
                "options": None,
                "label": None,
                "answer": "\\frac{1}{2}",
            }
        ],
    }
    for name, rows in sets.items():
        write_json_lines(folder / "data" / "v1" / f"{name}.jsonl", rows)


def _marked(letters) -> str:
    """An answer as GAOKAO-Bench asks for it."""
    return "".join(f"（{n}）【答案】 {one} <eoa>\n" for n, one in enumerate(letters, 1))


FILES = {
    "gaokao_bench": Published(
        write=gaokao_bench,
        examples=6,
        left_out=10,
        right=lambda example: _marked(example.extra["answer"]),
        false=lambda example: _marked(
            next(letter for letter in "BDF" if letter not in "".join(answer))
            for answer in [example.extra["answer"]]
            for _ in answer
        ),
        shot="请你做一道题",
        file="Data/Objective_Questions/2010-2022_Physics_MCQs.json",
        wrong=('"AC"', '"E"'),
        data=(140, 0),
    ),
    "agieval": Published(
        write=agieval,
        examples=7,
        left_out=18,
        shot="Question ",
        file="data/v1/lsat-ar.jsonl",
        wrong=('"E"', '"F"'),
        false=lambda example: "C, 3" if example.target != "C" else "D",
    ),
    "mmlu": Published(
        write=mmlu,
        right=lambda example: f"The answer is {LETTERS[example.target]}.",
        false=lambda example: f"The answer is {LETTERS[example.target - 1]}.",
        examples=6,
        left_out=55,
        shot="Question: ",
        file="test/anatomy_test.csv",
        wrong=(",one,", ",one,one,"),
        data=(14042, 0),
    ),
    "ceval": Published(
        write=ceval,
        right=lambda example: f"答案是 {LETTERS[example.target]}.",
        false=lambda example: f"答案是 {LETTERS[example.target - 1]}.",
        examples=6,
        left_out=49,
        shot="问题：",
        file="val/law_val.csv",
        wrong=("question", "Frage"),
        data=(96, 44),
    ),
    "cmmlu": Published(
        write=cmmlu,
        examples=6,
        left_out=65,
        shot="问题：",
        file="data/test/arts.csv",
        wrong=("Answer", "answer"),
    ),
    "arc_easy": Published(
        write=lambda folder: arc("ARC-Easy", folder),
        examples=3,
        left_out=2,
        shot="Question: ",
        file="ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Dev.jsonl",
        wrong=('"stem"', '"text"'),
        tfds={
            "validation": [
                {"id": f"Mercury_{n}", "question": f"What is {n}?", "answerKey": "BDA"[n]}
                | {"choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}}
                for n in range(3)
            ]
        },
        data=(47, 1),
    ),
    "arc_challenge": Published(
        write=lambda folder: arc("ARC-Challenge", folder),
        examples=3,
        left_out=2,
        shot="Question: ",
        file="ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Dev.jsonl",
        wrong=('"answerKey": "2"', '"answerKey": "B"'),
        tfds={
            "validation": [
                {"id": f"Mercury_{n}", "question": f"What is {n}?", "answerKey": "BDA"[n]}
                | {"choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}}
                for n in range(3)
            ]
        },
        data=(47, 1),
    ),
    "boolq": Published(
        write=boolq,
        examples=4,
        shot="\nQuestion: ",
        file="SuperGLUE/BoolQ/val.jsonl",
        wrong=("false", "0"),
        tfds={
            "validation": [
                {"question": f"is it {n}", "passage": "It is one.", "answer": n == 1, "title": "It"} for n in range(3)
            ]
        },
        data=(180, 0),
    ),
    "commonsenseqa": Published(
        write=commonsenseqa,
        examples=4,
        shot="Question: ",
        file="dev_rand_split.jsonl",
        wrong=("answerKey", "answer"),
        data="train_rand_split.jsonl: 5 rows, but 8 solved examples are needed",
    ),
    "hellaswag": Published(
        write=hellaswag,
        examples=3,
        shot="\n",
        file="data/hellaswag_val.jsonl",
        wrong=('"label": 2', '"label": ""'),
        tfds={
            "validation": [
                {"context": f"{n} men sail. they", "endings": ["sing.", "eat.", "swim.", "sleep."], "label": n}
                | {"activity_label": "Sailing", "split_type": "indomain", "source_id": "activitynet~v_1"}
                for n in range(3)
            ]
        },
        data=(2, 0),
    ),
    "piqa": Published(
        write=piqa,
        examples=4,
        shot="\nQ: ",
        file="piqa/data/valid.jsonl",
        wrong=("sol2", "sol3"),
        tfds={
            "validation": [
                {
                    "id": str(n),
                    "goal": f"open jar {n}",
                    "sol1": "turn the lid",
                    "sol2": "turn the table",
                    "label": n % 2,
                }
                for n in range(3)
            ]
        },
        data=(100, 0),
    ),
    "siqa": Published(
        write=siqa,
        examples=4,
        shot="\nQuestion: ",
        file="socialiqa-train-dev/dev.jsonl",
        wrong=("answerC", "answerD"),
        data=(200, 0),
    ),
    "ocnli": Published(
        write=ocnli,
        examples=3,
        left_out=1,
        shot="语句一",
        file="data/ocnli/dev.json",
        wrong=('"neutral"', "1"),
    ),
}
