"""Arithmetic with its working: every step is right, and the answer is the last number."""

import json
import re

import hypothesis
import pytest
from hypothesis import strategies

from qwen_jax.evaluation import extraction


@hypothesis.given(strategies.integers(0, 10**6), strategies.integers(0, 10**6), strategies.sampled_from("+-"))
def test_each_step_of_a_working_is_right_and_its_last_number_is_the_answer(tool, first, second, sign):
    text = tool("worked_sums").worked(f"{first}{sign}{second}=")
    steps, answer = text.rsplit(": ", 1)
    assert extraction.last_number(text) == answer == str(first + second if sign == "+" else first - second)
    digits = []
    for step in steps.split(", "):
        left, right = step.split("=")
        assert eval(left) == int(right) and 0 <= int(right) < 20  # of digits and signs alone
        assert re.fullmatch(r"\d+[+-]\d(\+1)?", left)
        digits.append(int(right) % 10)
    assert sum(digit * 10**place for place, digit in enumerate(digits)) == abs(int(answer)) % 10 ** len(digits)


def test_working_is_shown_of_training_lines_of_whole_numbers_alone(tool, tmp_path):
    make = tool("make_arithmetic")
    flags = ["--output", str(tmp_path), "--count=30", "--held_out=10", "--levels", "2", "--worked"]
    with pytest.raises(ValueError, match="--kinds add"):
        make.main(flags)
    make.main([*flags, "--kinds", "add"])
    names = ("train.jsonl", "test.jsonl")
    train, test = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names)
    assert all(": " in row["answer"] for row in train) and all(re.fullmatch(r"-?\d+", row["answer"]) for row in test)
    with pytest.raises(ValueError, match="'3\\*4=' is no sum"):
        tool("worked_sums").worked("3*4=")
