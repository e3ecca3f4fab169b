"""Sampling against transformers' own logits processors, and the draws against the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.inference.sampling import SamplingConfig, filtered_logits, sample


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_filters_mean_what_transformers_means(temperature, top_k, top_p):
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    logits = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32) * 3
    theirs = torch.tensor(logits)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        theirs = warper(None, theirs)
    ours = filtered_logits(jnp.asarray(logits), SamplingConfig(temperature, top_k, top_p))
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs.numpy()))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_draws_follow_the_probabilities_and_the_key():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    draw = jax.jit(jax.vmap(lambda key: sample(logits, key, SamplingConfig(1.0, 3))[0]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(draw(keys))
    np.testing.assert_array_equal(draws, draw(keys))
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, np.asarray([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)


def test_temperature_zero_is_greedy():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((5, 40)), jnp.float32)
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), SamplingConfig()), logits.argmax(-1))


@pytest.mark.parametrize(
    ("values", "named"),
    [((-1.0,), "temperature"), ((1.0, -2), "top_k"), ((1.0, 0, 0.0), "top_p"), ((1, 0, 1.5), "top_p")],
)
def test_values_out_of_range_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        SamplingConfig(*values)
