"""Benchmarks whose answers a model writes."""

import json
from pathlib import Path

from tests.evaluation.published import Published, write_json, write_json_lines


def gsm8k(folder: Path) -> None:
    def row(n: int) -> dict:
        worked = f"There are {n} birds.\nTwice {n} is 2*{n}=<<2*{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}"
        return {"question": f"How many are twice {n} birds?", "answer": worked}

    write_json_lines(folder / "train.jsonl", map(row, range(6012)))
    write_json_lines(folder / "test.jsonl", map(row, (9, 700, 20)))


def _math(n: int) -> dict:
    return {
        "problem": f"What is $\\frac{{{n}}}{{2}}$?",
        "level": "Level 1",
        "type": ("Algebra", "Number Theory")[n % 2],
        "solution": f"We divide: $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
    }


def math(folder: Path) -> None:
    write_json_lines(folder / "solved.jsonl", [{"problem": f"What is {n}?", "solution": f"{n}."} for n in range(4)])
    write_json_lines(folder / "test.jsonl", map(_math, range(5)))


def math_500(folder: Path) -> None:
    write_json_lines(folder / "solved.jsonl", [{"problem": f"What is {n}?", "solution": f"{n}."} for n in range(4)])
    rows = []
    for n in range(5):
        row = _math(n) | {"answer": f"\\frac{{{n}}}{{2}}", "unique_id": f"test/algebra/{n}.json", "level": n}
        rows.append(row | {"subject": row.pop("type")})
    write_json_lines(folder / "test.jsonl", rows)


def math401(folder: Path) -> None:
    rows = [("e^(iπ)+1=", "0"), ("2+3=", "5"), ("-0.5-1.25=", "-1.7500"), ("12×12=", "144")]
    write_json_lines(folder / "math401.json", [{"query": query, "response": response} for query, response in rows])


def arithmetic(folder: Path) -> None:
    rows = [("2+3=", "5", "add"), ("7/8=", "0.8750", "divide"), ("9+9=", "18", "add")]
    write_json_lines(
        folder / "test.jsonl",
        [{"question": question, "answer": answer, "kind": kind, "level": 1} for question, answer, kind in rows],
    )


def math23k(folder: Path) -> None:
    rows = [
        {"id": str(n), "original_text": f"第{n}题：一共有多少元？", "segmented_text": "", "equation": "x=1", "ans": ans}
        for n, ans in enumerate(("880", "14.4", "10%", "((3)/(4))", "5((7)/(10))"), 1)
    ]
    (folder / "math23k_test.json").write_text(
        "".join(json.dumps(row, ensure_ascii=False, indent=4) + "\n" for row in rows), encoding="utf-8"
    )


def natural_questions(folder: Path) -> None:
    rows = [
        {"question": "who wrote the song of the river", "answer": ["Ann Lee", "A. Lee"]},
        {"question": "when was the old bridge built", "answer": ["1913"]},
    ]
    write_json_lines(folder / "nq_open" / "NQ-open.dev.jsonl", rows)


def lambada(folder: Path) -> None:
    texts = [
        "The cat sat on the mat, and then it left the mat",
        'They drank tea.\n\n"More tea?" he asked about the tea',
    ]
    write_json_lines(folder / "lambada_test.jsonl", [{"text": text} for text in texts])


def bbh(folder: Path) -> None:
    for task, target in (("navigate", "No"), ("snarks", "(B)")):
        shots = "".join(
            f"\n\nQ: Is it {n}?\nA: Let's think step by step.\nSo the answer is {target}." for n in range(3)
        )
        (folder / "cot-prompts").mkdir(exist_ok=True)
        (folder / "cot-prompts" / f"{task}.txt").write_text(f"canary\n-----\nDo the task.{shots}")
        examples = [{"input": f"Is it {n}, or (A), or (B)?", "target": target} for n in range(3, 5)]
        write_json(folder / "bbh" / f"{task}.json", {"canary": "canary", "examples": examples})


FILES = {
    "gsm8k": Published(
        write=gsm8k,
        examples=3,
        shot="Question: ",
        file="test.jsonl",
        wrong=('"question"', '"q"'),
        right=lambda example: f"We think.\nThe answer is ${int(example.target):,}.00.",
        false=lambda example: "The answer is 7.",
        data=(1319, 0),
    ),
    "math": Published(
        write=math,
        examples=5,
        shot="Problem:\n",
        file="test.jsonl",
        wrong=("boxed", "bxd"),
        right=lambda example: f" So it is $\\boxed{{{example.target}}}$.\nFinal Answer: The final answer is that.",
        false=lambda example: " $\\boxed{17}$",
    ),
    "math_500": Published(
        write=math_500,
        examples=5,
        shot="Problem:\n",
        file="test.jsonl",
        wrong=('"problem"', '"p"'),
        right=lambda example: f"Final Answer: The final answer is ${example.target}$. I hope it is correct.",
    ),
    "math401": Published(
        write=math401, examples=4, shot="=", file="math401.json", wrong=('"5"', '"five"'), data=(200, 0)
    ),
    "arithmetic": Published(write=arithmetic, examples=3, shot="=", file="test.jsonl", wrong=('"18"', '"eighteen"')),
    "math23k": Published(
        write=math23k,
        examples=5,
        shot="问题：",
        file="math23k_test.json",
        wrong=('"14.4"', '"x元"'),
        right=lambda example: f"先算，再算，所以答案是{example.target}。",
        data=(200, 0),
    ),
    "natural_questions": Published(
        write=natural_questions,
        examples=2,
        shot="Q: ",
        file="nq_open/NQ-open.dev.jsonl",
        wrong=('["1913"]', '"1913"'),
        right=lambda example: f" The answer is the {example.target[0]}.",
        false=lambda example: " nobody",
        data=(150, 0),
        tfds={"validation": [{"question": "who sang it", "answer": ["Ann", "Ann Lee"]}]},
    ),
    "lambada": Published(
        write=lambada,
        examples=2,
        shot="Please complete the following sentence: ",
        file="lambada_test.jsonl",
        wrong=('"text"', '"passage"'),
        right=lambda example: f" {example.target}, and",
        false=lambda example: " house",
        data=(80, 0),
        tfds={"test": [{"passage": "he went to the door"}, {"passage": "she sang a song"}]},
    ),
    "bbh": Published(
        write=bbh,
        examples=4,
        left_out=25,
        shot="\n\nQ: ",
        file="bbh/navigate.json",
        wrong=('"target"', '"answer"'),
        right=lambda example: f"We think. So the answer is {example.target}.",
        false=lambda example: "So the answer is (Z).",
        data=(6511, 0),
    ),
}  # fmt: skip
