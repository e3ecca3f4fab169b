"""Writes questions for the code interpreter by rule: mathematics, figures (easy and hard), and work with files.

python tools/make_interpreter_questions.py --output runs/interpreter_questions

The publisher's file lies in no repository. These are in its layout, with fields by which results are checked here
(`qwen_jax.evaluation.interpreter_benchmark`): `answer`, `figure`, `contains`. `solutions.jsonl` has code that solves
each. Easy figures show numbers of the question; hard ones show numbers that have to be computed from a file.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

from qwen_jax import files
from qwen_jax.command_line import path_argument, run

FRUIT = ("apples", "pears", "plums", "cherries", "figs", "melons")
CITIES = ("Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Turin")
CHART = {
    "bar": ("a bar chart", "plt.bar(names, values)"),
    "barh": ("a horizontal bar chart", "plt.barh(names, values)"),
    "line": ("a line chart", "plt.plot(names, values)"),
    "pie": ("a pie chart", "plt.pie(values, labels=names)"),
    "scatter": ("a scatter plot", "plt.scatter(names, values)"),
}


def math_question(draw: random.Random) -> dict:
    """A sum whose answer nobody guesses."""
    price, count, rate, years = draw.randint(11, 99), draw.randint(101, 999), draw.randint(2, 9), draw.randint(3, 9)
    kind = draw.randrange(4)
    if kind == 0:
        boxes = draw.randint(12, 48)
        return {
            "query": f"A farm packs {count} boxes of {boxes} {draw.choice(FRUIT)} each; {price} are left over. "
            "How many are there in all?",
            "answer": str(count * boxes + price),
            "code": f"{count} * {boxes} + {price}",
        }
    if kind == 1:
        return {
            "query": f"{count * 100} yuan lie in a bank at {rate}% interest a year, compounded yearly. How much is it "
            f"after {years} years, in yuan, rounded to two decimals?",
            "answer": f"{round(count * 100 * (1 + rate / 100) ** years, 2):.2f}",
            "code": f"round({count * 100} * (1 + {rate} / 100) ** {years}, 2)",
        }
    if kind == 2:
        return {
            "query": f"从 1 到 {count} 的整数中，能被 {rate} 整除但不能被 {years + 9} 整除的数之和是多少？",
            "answer": str(sum(n for n in range(1, count + 1) if n % rate == 0 and n % (years + 9))),
            "code": f"sum(n for n in range(1, {count} + 1) if n % {rate} == 0 and n % {years + 9})",
            "lang": "zh",
        }
    numbers = [draw.randint(100, 999) for _ in range(9)]
    return {
        "query": f"What is the median of {', '.join(map(str, numbers))}, multiplied by {price}?",
        "answer": str(int(statistics.median(numbers)) * price),
        "code": f"import statistics\nint(statistics.median({numbers})) * {price}",
    }


def figure_question(draw: random.Random, hard: bool, folder: Path, number: int) -> dict:
    """A chart of numbers that are given, or that a file of sales has to be summed up for."""
    kind = draw.choice(sorted(CHART))
    words, plot = CHART[kind]
    names, title = draw.sample(CITIES, 4), f"Sales {draw.randint(1990, 2023)}"
    figure = {"kinds": [kind], "title": title}
    if hard:
        rows = [(draw.choice(names), draw.choice(FRUIT), draw.randint(1, 99)) for _ in range(60)]
        rows += [(name, FRUIT[0], 5) for name in names]
        file = f"sales_{number}.csv"
        text = "city,product,amount\n" + "".join(f"{city},{product},{amount}\n" for city, product, amount in rows)
        files.write_text(folder / file, text)
        names = sorted(names)
        values = [sum(amount for city, _, amount in rows if city == name) for name in names]
        query = (
            f"Draw {words} of the total amount of each city, cities in alphabetical order, with the title '{title}'."
        )
        read = (
            f"import csv\nrows = list(csv.DictReader(open('{file}')))\nnames = {names}\n"
            "values = [sum(int(row['amount']) for row in rows if row['city'] == name) for name in names]\n"
        )
        extra = {"input_file_path": [file]}
    else:
        values = [draw.randint(5, 99) for _ in names]
        told = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        query = f"Draw {words} of these sales, in this order, with the title '{title}': {told}."
        read, extra = f"names, values = {names}, {values}\n", {}
    figure["values"] = [values]
    code = f"import matplotlib.pyplot as plt\n{read}{plot}\nplt.title('{title}')\nplt.show()"
    return {"query": query, "figure": figure, "code": code, **extra}


def general_question(draw: random.Random, folder: Path, number: int) -> dict:
    """Work with a file of text."""
    words = [draw.choice(FRUIT + CITIES) for _ in range(80)]
    file = f"words_{number}.txt"
    files.write_text(folder / file, "\n".join(" ".join(words[i : i + 8]) for i in range(0, 80, 8)) + "\n")
    if draw.random() < 0.5:
        wanted = sorted(set(words), key=lambda word: (-words.count(word), word))[0]
        return {
            "query": "Which word of the file is the most frequent one (of equally frequent ones, the first in the "
            "alphabet)? Print it with its count as WORD COUNT.",
            "contains": [f"{wanted} {words.count(wanted)}"],
            "code": f"words = open('{file}').read().split()\n"
            "best = min(set(words), key=lambda word: (-words.count(word), word))\nprint(best, words.count(best))",
            "input_file_path": [file],
        }
    return {
        "query": "Write the distinct words of the file in alphabetical order as a JSON list to words.json, then print "
        "the content of words.json.",
        "contains": [json.dumps(sorted(set(words)))],
        "code": f"import json\nwords = sorted(set(open('{file}').read().split()))\n"
        "json.dump(words, open('words.json', 'w'))\nprint(open('words.json').read())",
        "input_file_path": [file],
    }


def write(folder: Path, count: int, seed: int) -> int:
    """Writes `count` questions of each of the four kinds with their solutions; returns how many there are."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    questions, solutions = [], []
    for number in range(4 * count):
        tags = ("math", "visualization,visualization-easy", "visualization,visualization-hard", "general")[number % 4]
        made = {
            "math": lambda: math_question(draw),
            "visualization,visualization-easy": lambda: figure_question(draw, False, folder, number),  # noqa: B023
            "visualization,visualization-hard": lambda: figure_question(draw, True, folder, number),  # noqa: B023
            "general": lambda: general_question(draw, folder, number),  # noqa: B023
        }[tags]()
        solutions.append({"id": str(number), "code": made.pop("code")})
        questions.append({"id": str(number), "tags": f"all_ci,{tags}", "lang": "en", **made})
    for name, rows in (("questions.jsonl", questions), ("solutions.jsonl", solutions)):
        files.write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(questions)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="made if missing")
    parser.add_argument("--count", type=int, default=40, help="questions of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, found {arguments.count}")
    written = write(arguments.output, arguments.count, arguments.seed)
    print(f"wrote {written} questions to {arguments.output / 'questions.jsonl'}, solutions beside it")


if __name__ == "__main__":
    run(main)
