"""Sampling against transformers' own logits processors, and the draws against the probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.inference import Request
from qwen_jax.inference.batch import sampling_of
from qwen_jax.inference.sampling import (
    RowSampling,
    SamplingConfig,
    filtered_logits,
    most_likely,
    next_tokens,
    penalized_logits,
)

VALUES = [(t, k, p) for t in (0.3, 1.0, 2.5) for k in (0, 1, 7, 500) for p in (0.05, 0.6, 0.95, 1.0)]
VALUES += [(t, k, p, 1.0, m) for t in (0.7, 2.5) for k in (0, 7) for p in (0.9, 1.0) for m in (0.02, 0.3, 1.0)]


# By itself, with the other filters, and where it keeps more tokens than are looked at first.
MIN_P = [(1.3, 0, 1.0, 1.0, 0.05), (2.0, 30, 0.9, 1.0, 0.2), (1.0, 0, 1.0, 1.0, 0.001)]


def rows(*configs, seeds=None):
    return jax.tree.map(jnp.asarray, RowSampling.of(configs, seeds or range(len(configs))))


def draws(logits, config, count):
    """`count` draws for each row of logits [rows, vocabulary], by count different seeds: [rows, count]."""
    repeated = jnp.repeat(logits, count, axis=0)
    sampling = rows(*[config] * len(repeated))
    tokens, *_ = jax.jit(next_tokens)(repeated, jnp.zeros(repeated.shape, bool), sampling, jnp.full(len(repeated), 9))
    return np.asarray(tokens).reshape(-1, count)


def theirs(logits, temperature, top_k, top_p, repetition_penalty=1.0, min_p=0.0):
    """Logits of transformers' warpers, numpy [rows, vocabulary]."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    scores = torch.tensor(logits)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    assert repetition_penalty == 1
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


def test_filters_mean_what_transformers_means():
    """All of them at once, every row by its own rule."""
    logits = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32) * 3
    wanted = np.concatenate([theirs(logits, *values) for values in VALUES])
    sampling = rows(*[SamplingConfig(*values) for values in VALUES for _ in range(4)])
    scaled = jnp.tile(logits, (len(VALUES), 1)) / sampling.temperature[:, None]
    ours = filtered_logits(scaled, sampling)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "values", [(1.3, 0, 1.0), (1.0, 20, 1.0), (0.9, 0, 0.8), (2.0, 30, 0.9), (3.0, 400, 0.97), *MIN_P]
)
def test_draws_follow_the_probabilities_of_transformers(values):
    """Of 1,000 tokens: among the most probable ones, among all, and where these are not enough."""
    logits = np.random.default_rng(1).standard_normal((1, 1000)).astype(np.float32) * 2
    wanted = theirs(logits, *values)[0].astype(np.float64)
    wanted = np.exp(wanted - wanted.max()) / np.exp(wanted - wanted.max()).sum()
    found = np.bincount(draws(jnp.asarray(logits), SamplingConfig(*values), 5000)[0], minlength=1000) / 5000
    assert (found[wanted == 0] == 0).all()
    assert np.abs(found - wanted).max() < 0.03 and np.abs(found - wanted).sum() < 0.3


def test_repetition_penalty_means_what_transformers_means():
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    random = np.random.default_rng(2)
    logits, ids = random.standard_normal((3, 50)).astype(np.float32), random.integers(0, 50, (3, 20))
    seen = np.zeros((3, 50), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    for penalty in (0.7, 1.0, 1.5):
        wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits))
        ours = penalized_logits(jnp.asarray(logits), seen, jnp.full(3, penalty))
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-6)


def test_penalties_of_openai_and_biases_are_what_its_reference_says():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, of what was generated; the repetition penalty comes before."""
    random = np.random.default_rng(5)
    logits, counts = random.standard_normal((4, 40)).astype(np.float32), random.integers(0, 4, (4, 40))
    seen = (counts > 0) | (random.random((4, 40)) < 0.3)
    given = [(1.0, 0.5, 0.0), (1.0, -2.0, 1.5), (1.4, 0.0, -0.25), (0.8, 0.0, 0.0)]
    biases = [{3: 100.0, 39: -100.0}, {}, {0: 1.5, 1: -2.5, 2: 0.25}, {7: -1.0}]
    configs = [SamplingConfig(0.0, 0, 1.0, r, presence_penalty=p, frequency_penalty=f) for r, p, f in given]
    requests = [Request([1], 1, config, logit_bias=bias) for config, bias in zip(configs, biases, strict=True)]
    wanted = logits.astype(np.float64)
    for row, ((repetition, presence, frequency), bias) in enumerate(zip(given, biases, strict=True)):
        for token, value in bias.items():
            wanted[row, token] += value
        lowered = np.where(wanted[row] > 0, wanted[row] / repetition, wanted[row] * repetition)
        wanted[row] = np.where(seen[row], lowered, wanted[row])
        wanted[row] -= counts[row] * frequency + (counts[row] > 0) * presence
    greedy, log_probs, _ = next_tokens(
        jnp.asarray(logits), seen, sampling_of(requests, 40), jnp.arange(4), greedy=True, counts=jnp.asarray(counts)
    )
    assert greedy.tolist() == wanted.argmax(-1).tolist() != logits.argmax(-1).tolist()
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits)[np.arange(4), greedy], rtol=1e-5)
    warm = [
        dataclasses.replace(request, sampling=dataclasses.replace(config, temperature=1.0))
        for request, config in zip(requests, configs, strict=True)
    ]
    drawn, _, behavior = next_tokens(
        jnp.asarray(logits), seen, sampling_of(warm, 40), jnp.arange(4), counts=jnp.asarray(counts)
    )
    np.testing.assert_allclose(behavior, jax.nn.log_softmax(wanted)[np.arange(4), drawn], rtol=1e-5, atol=1e-6)


def test_the_most_probable_tokens_have_the_log_probabilities_of_drawn_ones():
    logits = jnp.asarray(np.random.default_rng(6).standard_normal((5, 300)), jnp.float32)
    ids, log_probs = most_likely(logits)
    wanted = np.sort(jax.nn.log_softmax(logits))[:, ::-1][:, :20]
    np.testing.assert_allclose(log_probs, wanted, rtol=1e-6)
    greedy, own, _ = next_tokens(logits, jnp.zeros(logits.shape, bool), rows(*[SamplingConfig()] * 5), jnp.arange(5))
    assert ids[:, 0].tolist() == greedy.tolist() and log_probs[:, 0].tolist() == own.tolist()


def test_a_row_draws_by_its_own_rules_seed_and_position_alone():
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((6, 700)), jnp.float32)
    seen = jnp.asarray(np.random.default_rng(4).random((6, 700)) < 0.1)
    configs = [
        SamplingConfig(),
        SamplingConfig(1.0),
        SamplingConfig(0.7, 50, 0.9),
        SamplingConfig(2.0, 600, 0.99, 1.5),
        SamplingConfig(1.0, 0, 0.99),
        SamplingConfig(repetition_penalty=3.0),
    ]
    positions = jnp.arange(6) * 10
    together, log_probs, behavior = next_tokens(logits, seen, rows(*configs), positions)
    for row, config in enumerate(configs):
        one = slice(row, row + 1)
        alone, log_prob, alone_behavior = next_tokens(logits[one], seen[one], rows(config, seeds=[row]), positions[one])
        assert alone[0] == together[row]
        np.testing.assert_allclose(log_prob[0], log_probs[row], rtol=1e-6)
        np.testing.assert_allclose(log_prob[0], jax.nn.log_softmax(logits[row])[alone[0]], rtol=1e-5)
        np.testing.assert_allclose(alone_behavior[0], behavior[row], rtol=1e-5)
        assert config.temperature > 0 or behavior[row] == 0
    assert together[0] == logits[0].argmax()
    moved, *_ = next_tokens(logits, seen, rows(*configs), positions + 1)
    reseeded, *_ = next_tokens(logits, seen, rows(*configs, seeds=range(6, 12)), positions)
    for other in (moved, reseeded):
        assert (other[jnp.asarray([0, 5])] == together[jnp.asarray([0, 5])]).all()
        assert (other[1:5] != together[1:5]).any()


@pytest.mark.parametrize(
    "values", [(1.3, 0, 1.0), (0.9, 20, 1.0), (0.9, 0, 0.8), (2.0, 30, 0.9), (3.0, 400, 0.97), *MIN_P]
)
def test_behavior_log_probabilities_are_of_the_distribution_of_transformers(values):
    """After temperature and filters, whether the most probable tokens are enough to know them or not."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    logits = np.random.default_rng(1).standard_normal((30, 1000)).astype(np.float32) * 2
    sampling = rows(*[SamplingConfig(*values)] * 30)
    seen = jnp.zeros(logits.shape, bool)
    tokens, log_probs, behavior = next_tokens(jnp.asarray(logits), seen, sampling, jnp.arange(30))
    wanted = torch.log_softmax(torch.tensor(theirs(logits, *values)), -1).numpy()
    np.testing.assert_allclose(behavior, wanted[np.arange(30), tokens], rtol=1e-5, atol=1e-5)
    assert (np.asarray(behavior) != np.asarray(log_probs)).all()


@pytest.mark.parametrize(
    "values",
    [(1e-10,), (1e-10, 0, 1.0, 1e10), (1.0, 0, 1e-10), (1.0, 0, 1e-45), (1.0, 5, 1e-300), (1.0, 0, 1, 1e-10, 1)],
)
def test_the_smallest_values_draw_the_most_probable_token(values):
    """Not only where float32 has a number for the rule: nothing becomes infinite, and something is always kept."""
    logits = jnp.asarray(np.random.default_rng(7).standard_normal((4, 1000)) * 100, jnp.float32)
    seen = jnp.arange(1000)[None] % 2 == jnp.arange(4)[:, None] % 2
    config = SamplingConfig(*values)
    wanted = penalized_logits(logits, seen, jnp.full(4, config.repetition_penalty)).argmax(-1)
    tokens, _, behavior = next_tokens(logits, seen, rows(*[config] * 4), jnp.arange(4))
    assert tokens.tolist() == wanted.tolist() and behavior.tolist() == [0.0] * 4


def test_the_largest_temperature_draws_any_token():
    logits = jnp.asarray(np.random.default_rng(7).standard_normal((1, 1000)) * 100, jnp.float32)
    tokens, _, behavior = next_tokens(logits, jnp.zeros((1, 1000), bool), rows(SamplingConfig(1e10)), jnp.arange(1))
    assert 0 <= tokens[0] < 1000 and behavior[0] == pytest.approx(-np.log(1000), rel=1e-5)


def test_a_token_without_probability_is_never_drawn():
    logits = jnp.where(jnp.arange(2000) % 7 == 3, 0.0, -jnp.inf)[None]
    assert set(draws(logits, SamplingConfig(1.0), 4000)[0] % 7) == {3}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((-1.0,), "temperature"),
        ((float("nan"),), "temperature"),
        ((1.0, -2), "top_k"),
        ((1.0, 2.5), "top_k"),
        ((1.0, 0, 0.0), "top_p"),
        ((1, 0, 1.5), "top_p"),
        ((1, 0, 1, 0.0), "repetition_penalty"),
        ((1, 0, 1, 1, 1.5), "min_p"),
        ((1, 0, 1, 1, float("nan")), "min_p"),
        ((1, 0, 1, 1, 0, 2.5), "presence_penalty"),
        ((1, 0, 1, 1, 0, 0, float("nan")), "frequency_penalty"),
        ((10**400,), r"temperature must be 0 \(greedy\) or from 1e-10 to 1e\+10"),
        ((1e-11,), "temperature"),
        ((1e11,), "temperature"),
        ((1, 0, 1, 10**400), "repetition_penalty must be from 1e-10 to"),
        ((1, 0, 1, 1e-11), "repetition_penalty"),
    ],
)
def test_values_out_of_range_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        SamplingConfig(*values)
