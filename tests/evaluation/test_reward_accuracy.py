"""Accuracy, calibration and the table of reward models, against scikit-learn where it is and against hand values."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.evaluation.reward_accuracy import accuracy_table, pair_accuracy, wilson_interval


def test_figures_of_four_comparisons():
    found = pair_accuracy(np.array([2.0, 1.0, -1.0, 0.0]), num_bins=2)
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 1.0, 1.0, 0.0])))
    assert found.pairs == 4 and found.accuracy == 2.5 / 4 and found.margin == 0.5
    assert found.confidence == pytest.approx(sigmoid.mean())
    assert found.loss == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in (2, 1, -1, 0)]))
    low, high = found.bins
    assert (low.low, low.high, low.pairs, low.accuracy) == (0.5, 0.75, 3, 0.5)
    assert (high.low, high.high, high.pairs, high.accuracy) == (0.75, 1.0, 1, 1.0)
    low_gap, high_gap = abs(0.5 - sigmoid[1:].mean()), 1 - sigmoid[0]
    assert found.calibration_error == pytest.approx((3 * low_gap + high_gap) / 4)


def test_the_interval_is_wilsons():
    """10 of 20: 0.2993 to 0.7007 (statsmodels' proportion_confint with method wilson)."""
    assert wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=5e-5)
    low, high = wilson_interval(0, 5)
    assert low == pytest.approx(0, abs=1e-12) and 0.4 < high < 0.5


@hypothesis.given(st.lists(st.floats(-50, 50), min_size=1, max_size=80), st.integers(1, 12))
def test_every_comparison_is_in_one_bin_and_bins_average_to_the_whole(margins, num_bins):
    found = pair_accuracy(np.array(margins), num_bins)
    assert sum(one.pairs for one in found.bins) == found.pairs == len(margins)
    for whole, field in ((found.accuracy, "accuracy"), (found.confidence, "confidence")):
        mean = sum(one.pairs * getattr(one, field) for one in found.bins) / found.pairs
        assert mean == pytest.approx(whole, abs=1e-12)
    assert all(one.low - 1e-9 <= one.confidence <= one.high + 1e-9 for one in found.bins)
    low, high = found.interval
    assert 0 <= low <= found.accuracy + 1e-12 and found.accuracy <= high + 1e-12 and high <= 1


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_does_not():
    random = np.random.default_rng(0)
    margins = np.abs(random.standard_normal(20_000) * 2)
    right = random.random(20_000) < 1 / (1 + np.exp(-margins))
    signed = np.where(right, margins, -margins)
    assert pair_accuracy(signed).calibration_error < 0.02 < 0.1 < pair_accuracy(5 * signed).calibration_error


def test_nothing_to_measure_and_margins_that_are_not_numbers_are_named():
    with pytest.raises(ValueError, match="no comparison to measure"):
        pair_accuracy(np.array([]))
    with pytest.raises(ValueError, match="comparison 1 is nan"):
        pair_accuracy(np.array([1.0, np.nan]))


def test_the_table_has_a_row_for_each_model_and_a_column_for_each_set():
    good, bad = pair_accuracy(np.ones(100)), pair_accuracy(np.r_[np.ones(60), -np.ones(40)])
    table = accuracy_table({"PMP": {"Helpful": bad, "SHP": bad}, "RM": {"Helpful": good, "SHP": bad}})
    lines = table.splitlines()
    assert lines[0] == "| | Helpful | SHP |" and lines[1] == "|---|---|---|"
    assert lines[2].startswith("| PMP | 60.00 ± ") and lines[3].startswith("| RM | 100.00 ± ")
    assert lines[4] == "| comparisons | 100 | 100 |"
