"""Arithmetic made by rule: right by another calculator, in the style of Math401, without overlap of the two files."""

import collections
import json
import math
import re

import pytest
import sympy

# How the questions are read by sympy, which knows no other way to write them.
_WRITTEN = (
    ("×", "*"),
    ("÷", "/"),
    ("^", "**"),
    ("π", "pi"),
    ("log2(", "log2_("),
    ("log10(", "log10_("),
    ("ln(", "log("),
)
_NAMES = {"e": sympy.E, "log2_": lambda x: sympy.log(x, 2), "log10_": lambda x: sympy.log(x, 10)}


def _value(question: str) -> sympy.Expr:
    text = question.removesuffix("=")
    for ours, theirs in _WRITTEN:
        text = text.replace(ours, theirs)
    text = re.sub(r"(-?[\d.]+)pi\)", r"\1*pi)", text)
    text = re.sub(r"(-?\d+)°", r"\1*pi/180", text)
    return sympy.sympify(text, locals=_NAMES)


@pytest.fixture(scope="module")
def arithmetic(tool):
    return tool("make_arithmetic")


@pytest.fixture(scope="module")
def made(arithmetic):
    return arithmetic.make(1500, 200, kinds=list(arithmetic.KINDS), levels=[1, 2, 3, 4], seed=7)


def test_answers_are_right_in_every_kind_and_level(made, arithmetic):
    rows = made[1]
    assert {row["kind"] for row in rows} == set(arithmetic.KINDS) and {row["level"] for row in rows} == {1, 2, 3, 4}
    for row in rows:
        found = float(_value(row["question"]).evalf(20))
        assert math.isclose(float(row["answer"]), found, rel_tol=1e-12, abs_tol=5.0001e-5), row
        whole = row["kind"] in ("add", "negative", "multiply", "power")
        assert re.fullmatch(r"-?\d+" if whole else r"-?\d+\.\d{4}", row["answer"]), row


def _calculation(question: str) -> object:
    """Equal for two ways to write one sum or product."""
    found = re.fullmatch(r"(-?[\d.]+)(\+|\*|×)\(?(-?[\d.]+)\)?=", question)
    if not found:
        return question.replace("×", "*").replace("÷", "/").replace("**", "^").replace("π", "pi")
    return found[2].replace("×", "*"), frozenset(collections.Counter((float(found[1]), float(found[3]))).items())


def test_no_calculation_is_in_both_files_or_twice(made):
    train, held_out, _ = made
    assert (len(train), len(held_out)) == (1500, 200)
    calculations = [_calculation(row["question"]) for row in [*train, *held_out]]
    assert len(set(calculations)) == 1700


def test_the_seed_decides_and_the_command_writes_what_the_task_and_the_benchmark_read(arithmetic, tmp_path, capsys):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        flags = ["--count", "30", "--held_out", "10", "--kinds", "add", "--levels", "1", "2", "--seed", seed]
        arithmetic.main(["--output", str(tmp_path / folder), *flags])
    texts = [(tmp_path / folder / "train.jsonl").read_text() for folder in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert "train.jsonl: 30 calculations" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "a" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and set(rows[0]) == {"question", "answer", "kind", "level"}


def test_what_runs_out_is_said_and_too_many_are_refused(arithmetic):
    # Within 10: 121 differences, and 66 sums whatever their order.
    with pytest.raises(ValueError, match=r"add at the levels 1: only 187 calculations, and .* ask for 501: "):
        arithmetic.make(500, 1, kinds=["add"], levels=[1], seed=0)
    *_, exhausted = arithmetic.make(6000, 0, kinds=["add"], levels=[1, 2], seed=0)
    assert exhausted == ["add at level 1"]
