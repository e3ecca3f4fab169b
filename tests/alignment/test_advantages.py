"""Rewards and advantages: values written down, an independent numpy computation, and those of trl and verl."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.alignment import advantages as plain
from qwen_jax.alignment.advantages import RunningMean, kl_estimate

# As one program each: outside of one, every operation is compiled by itself, for each shape.
estimate = jax.jit(plain.kl_estimate, static_argnames="estimator")
explained_variance, generalized_advantages, token_rewards = map(
    jax.jit, (plain.explained_variance, plain.generalized_advantages, plain.token_rewards)
)
group_advantages = jax.jit(plain.group_advantages, static_argnames=("group_size", "scale"))
whiten = jax.jit(plain.whiten, static_argnames="shift_mean")
add, normalize = jax.jit(RunningMean.add), jax.jit(RunningMean.normalize, static_argnames="scale")


def batch(rows=5, length=9, seed=0, ragged=True):
    """Rewards, values, log-probabilities of policy and reference, and the mask of responses of any place and length."""
    random = np.random.default_rng(seed)
    rewards, values, logs, reference = random.standard_normal((4, rows, length)).astype(np.float32)
    start = random.integers(0, 3, (rows, 1)) if ragged else np.zeros((rows, 1), int)
    end = random.integers(4, length + 1, (rows, 1)) if ragged else np.full((rows, 1), length)
    place = np.arange(length)
    mask = ((place >= start) & (place < end)).astype(np.float32)
    return rewards * mask, values * mask, logs - 2, reference - 2, mask


def numpy_advantages(rewards, values, mask, discount, decay):
    """Sums of discounted temporal differences, in float64: another formula than a recursion."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        places = np.flatnonzero(mask[row])
        r, v = rewards[row, places].astype(float), values[row, places].astype(float)
        following = np.append(v[1:], 0.0)
        differences = r + discount * following - v
        for i, place in enumerate(places):
            powers = (discount * decay) ** np.arange(len(places) - i)
            advantages[row, place] = (powers * differences[i:]).sum()
    return advantages, np.where(mask > 0, advantages + values, 0)


def test_the_estimators_of_kl():
    """A4: the same two numbers, another sign and another size."""
    for policy, reference, k1, k3 in ((-1.0, -2.0, 1.0, 0.3679), (-2.0, -1.0, -1.0, 0.7183)):
        policy, reference = jnp.float32(policy), jnp.float32(reference)
        assert float(estimate(policy, reference)) == pytest.approx(k1)
        assert float(estimate(policy, reference, "k3")) == pytest.approx(k3, abs=1e-4)
        assert float(estimate(policy, reference, "k2")) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be one of k1, k2, k3, found 'k4'"):
        kl_estimate(policy, reference, "k4")


@given(st.lists(st.floats(-20, 0, width=32), min_size=2, max_size=8), st.floats(0.01, 3))
def test_k3_is_never_negative_and_nothing_at_equality(logs, shift):
    logs = np.pad(np.asarray(logs, np.float32), (0, 8 - len(logs)), mode="edge")
    assert (np.asarray(estimate(logs, logs + np.float32(shift), "k3")) >= 0).all()
    assert (np.asarray(estimate(logs, logs, "k3")) == 0).all()


def test_returns_written_down():
    """A3: fractional scores are not truncated."""
    mask = jnp.ones((1, 3))
    _, returns = generalized_advantages(jnp.asarray([[0.0, 0.0, 1.0]]), jnp.full((1, 3), 0.5), mask)
    np.testing.assert_allclose(returns, [[0.95125, 0.975, 1.0]], rtol=1e-6)
    _, fractional = generalized_advantages(jnp.asarray([[0.0, 0.0, 0.7]]), jnp.zeros((1, 3)), mask)
    np.testing.assert_allclose(fractional[0, 2], 0.7, rtol=1e-6)


def test_whitening_written_down():
    x, mask = jnp.asarray([[1.0, 2.0, 3.0, 99.0]]), jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_allclose(whiten(x, mask), [[-1, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), [[1, 2, 3, 0]], atol=1e-6)


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
def test_advantages_equal_an_independent_computation(discount, decay):
    rewards, values, _, _, mask = batch(rows=7, length=12)
    found = generalized_advantages(*map(jnp.asarray, (rewards, values, mask)), discount, decay)
    for ours, theirs in zip(found, numpy_advantages(rewards, values, mask, discount, decay), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_token_outside_the_response_is_passed_over():
    rewards, values, _, _, _ = batch(rows=3, length=8, ragged=False)
    mask = np.asarray([[1, 1, 0, 0, 1, 1, 0, 1]] * 3, np.float32)
    found, _ = generalized_advantages(*map(jnp.asarray, (rewards, values, mask)))
    expected, _ = numpy_advantages(rewards, values, mask, 1.0, 0.95)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_score_stands_at_the_end_token_and_kl_at_every_token():
    _, _, logs, reference, mask = batch()
    scores = np.asarray([0.3, -1.5, 2.0, 0.0, 0.7], np.float32)
    kl = estimate(jnp.asarray(logs), jnp.asarray(reference))
    found = np.asarray(token_rewards(jnp.asarray(scores), kl, jnp.asarray(mask), 0.04))
    expected = -0.04 * (logs.astype(float) - reference) * mask
    for row in range(len(mask)):
        expected[row, np.flatnonzero(mask[row])[-1]] += scores[row]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_group_advantages_are_relative_and_have_unit_spread():
    scores = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    groups = scores.reshape(3, 4).astype(float)
    centered = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(group_advantages(jnp.asarray(scores), 4, scale=False), centered.ravel(), atol=1e-6)
    expected = centered / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(jnp.asarray(scores), 4), expected.ravel(), rtol=1e-5)
    assert (np.asarray(group_advantages(jnp.full(8, 0.5), 4)) == 0).all()


def test_explained_variance():
    _, values, _, _, mask = batch()
    values, mask = jnp.asarray(values), jnp.asarray(mask)
    assert float(explained_variance(values, values, mask)) == pytest.approx(1)
    assert float(explained_variance(jnp.full_like(values, 3.0), values, mask)) == pytest.approx(0, abs=1e-6)
    assert float(explained_variance(-values, values, mask)) == pytest.approx(-3, abs=1e-4)


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=0, max_size=9), min_size=1, max_size=6))
def test_the_running_mean_is_that_of_all_numbers_so_far(batches):
    running, seen = RunningMean.empty(), []
    for numbers in batches:
        # What the mask leaves out does not count.
        x, mask = np.full(10, 1e6, np.float32), np.zeros(10, np.float32)
        x[: len(numbers)], mask[: len(numbers)] = numbers, 1
        running = add(running, x, mask)
        seen += numbers
        mean = np.mean(seen) if seen else 0.0
        assert float(running.mean) == pytest.approx(mean, abs=1e-3)
        assert float(running.count) == len(seen)
        if len(seen) > 1:
            assert float(running.squares) == pytest.approx(np.var(seen) * len(seen), rel=1e-3, abs=0.1)
    np.testing.assert_allclose(normalize(running, np.float32(2.0)), 2.0 - np.asarray(running.mean))


def test_scaling_by_the_running_deviation():
    x = np.random.default_rng(0).standard_normal(40).astype(np.float32) * 3 + 5
    running = add(add(RunningMean.empty(), x[:7], np.ones(7, np.float32)), x[7:], np.ones(33, np.float32))
    expected = (x - x.mean()) / x.std(ddof=1)
    np.testing.assert_allclose(normalize(running, x, scale=True), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def recorded(root):
    """Functions of trl 1.12.0 and verl 0.9.1, run by tests/golden/rlhf/record.py."""
    return json.loads((root / "tests/golden/rlhf/recorded.json").read_text())


def test_kl_rewards_advantages_and_whitening_equal_trl(recorded):
    """trl puts the score one position after the end token, where there is room; its own rewards show the rest."""
    given = {name: jnp.asarray(value, jnp.float32) for name, value in recorded["inputs"].items()}
    found, mask = recorded["trl"], given["mask"]
    kl = {name: estimate(given["log_probs"], given["reference"], name) * mask for name in ("k1", "k3")}
    for name in kl:
        np.testing.assert_allclose(kl[name], np.asarray(found["kl"][name]) * mask, rtol=1e-5, atol=1e-6)
    rewards, wider = jnp.asarray(found["rewards"]), jnp.asarray(found["mask_p1"])
    ours = token_rewards(given["scores"], kl["k1"], mask, 0.05)
    np.testing.assert_allclose(ours.sum(axis=1), rewards.sum(axis=1), rtol=1e-5, atol=1e-6)
    full = np.asarray(mask).all(axis=1)
    np.testing.assert_allclose(ours[full], rewards[full], rtol=1e-5, atol=1e-6)
    advantages, returns = generalized_advantages(rewards, given["values"] * wider, wider, 1.0, 0.95)
    np.testing.assert_allclose(returns, found["returns"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whiten(advantages, mask), found["whitened"], rtol=1e-4, atol=1e-5)


def test_kl_advantages_and_whitening_equal_verl(recorded):
    given = {name: jnp.asarray(value, jnp.float32) for name, value in recorded["inputs"].items()}
    found, mask = recorded["verl"], given["mask"]
    for name, theirs in found["kl"].items():
        np.testing.assert_allclose(estimate(given["log_probs"], given["reference"], name), theirs, atol=1e-5)
    advantages, returns = generalized_advantages(given["rewards"], given["values"] * mask, mask, 1.0, 0.95)
    np.testing.assert_allclose(returns, np.asarray(found["returns"]) * mask, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whiten(advantages, mask), found["whitened"], rtol=1e-4, atol=1e-5)
    groups = group_advantages(given["scores"], 3)
    # verl adds 1e-6 to the deviation, we 1e-4 as trl does.
    np.testing.assert_allclose(groups, found["group_advantages"], rtol=1e-3)
