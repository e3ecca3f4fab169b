"""The nucleus of a distribution (top-p, Holtzman et al. 2020, arXiv 1904.09751), without sorting the vocabulary."""

import math

import jax
import jax.numpy as jnp

# Halvings of the interval that the threshold lies in, about 14 nats for the released vocabulary and top-p 0.9.
_HALVINGS = 24


def nucleus_threshold(logits: jax.Array, log_normalizer: jax.Array, top_p: float) -> jax.Array:
    """A number between the lowest logit in the nucleus and the highest outside: tokens above it are inside.

    The nucleus is the smallest set of the most probable tokens whose probabilities sum to at least `top_p`; tokens as
    probable as the last one are inside, too. The threshold is found by halving an interval: sums over the vocabulary
    are all it takes, so the vocabulary may be split over devices, and a CPU does not sort.

    Args:
      logits: float32 [..., vocabulary], divided by the temperature.
      log_normalizer: float32 [...], logarithm of the sum of their exponentials.
      top_p: in (0, 1).

    Returns:
      float32 [...]. Minus infinity where all tokens are inside. It has no gradient.
    """
    logits, log_normalizer = jax.lax.stop_gradient((logits, log_normalizer))
    # Tokens less probable than this sum to less than 1 - top_p, so all of them are outside.
    low = log_normalizer + math.log((1.0 - top_p) / logits.shape[-1]) - 1e-3
    high = jnp.max(logits, axis=-1)

    def halve(_, interval):
        low, high = interval
        middle = 0.5 * (low + high)
        above = jnp.where(logits > middle[..., None], jnp.exp(logits - log_normalizer[..., None]), 0.0)
        too_low = jnp.sum(above, axis=-1) >= top_p
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    inside = logits > low[..., None]
    lowest_inside = jnp.min(jnp.where(inside, logits, jnp.inf), axis=-1)
    highest_outside = jnp.max(jnp.where(inside, -jnp.inf, logits), axis=-1)
    # Half-way between the two, so that other rounding of the same logits gives the same nucleus.
    return jnp.where(jnp.isneginf(highest_outside), -jnp.inf, 0.5 * (lowest_inside + highest_outside))
