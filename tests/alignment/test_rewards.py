"""Rewards that a program computes, and what is refused of them."""

import numpy as np
import pytest

from qwen_jax.alignment.rewards import (
    check_scores,
    compute_rewards,
    exact_answer,
    match_count,
    matches_format,
    near_length,
)


def test_built_in_rewards():
    assert exact_answer("2+2?", " 4\n", "4") == 1 and exact_answer("2+2?", "44", "4") == 0
    assert [match_count("", text, None, r"\bok\b", 2) for text in ("", "ok", "ok ok", "ok ok ok ok")] == [0, 0.5, 1, 0]
    assert (
        matches_format("", "<a>\n</a>", None, r"<a>.*</a>") == 1
        and matches_format("", "x<a></a>", None, r"<a>.*</a>") == 0
    )
    assert [near_length("", "x" * n, None, 10) for n in (10, 5, 0, 100)] == [1, 0.5, 0, -1]


def test_a_reward_without_its_answer_or_pattern_says_so():
    with pytest.raises(ValueError, match="'2\\+2\\?' has no reference answer: give one as `answer`"):
        exact_answer("2+2?", "4", None)
    with pytest.raises(ValueError, match="match_count has no pattern"):
        match_count("", "", None)


def test_settings_that_give_no_reward_are_named():
    for function, name in ((match_count, "match_count"), (matches_format, "matches_format")):
        with pytest.raises(ValueError, match=rf"{name}.pattern '\(' is no regular expression: missing \)"):
            function("", "x", None, "(")
    with pytest.raises(ValueError, match="match_count.best must be at least 1, found 0"):
        match_count("", "x", None, "x", 0)
    with pytest.raises(ValueError, match="near_length.characters must be at least 1, found 0"):
        near_length("", "x", None, 0)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(2), 2, 0.5])
def test_rewards_may_be_numbers_of_numpy(number):
    (found,) = compute_rewards(lambda *text: number, "of the run", [("p", "r", None)], 0, 1)
    assert found == number and type(found) is float


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None, "1", True])
def test_rewards_that_are_no_finite_numbers_are_named(wrong):
    texts = [("p", "first", None), ("p", "second 你好", None), ("q", "third", None), ("q", "fourth", None)]
    function = lambda prompt, response, answer: wrong if response == "third" else 1  # noqa: E731
    with pytest.raises(ValueError, match=r'reward of the run gave .* for prompt 11 of the order, response "third"'):
        compute_rewards(function, "of the run", texts, 10, 2)
    assert compute_rewards(lambda *text: 2, "two", texts, 10, 2) == [2.0] * 4


def test_a_reward_model_that_is_broken_is_named():
    check_scores([0.0, 1.0], 4, 2)
    with pytest.raises(ValueError, match="reward model gave nan for prompt 5 of the order"):
        check_scores([0.0, 1.0, float("nan"), 1.0], 4, 2)
