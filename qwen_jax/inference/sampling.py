"""Choosing the next token; temperature, top-k and top-p mean what transformers' `generate` gives them, in its order."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: only the k most probable tokens; 0 keeps all.
      top_p: only the smallest set of most probable tokens whose probabilities sum to at least this; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or positive, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")


def filtered_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits divided by the temperature, minus infinity where top-k or top-p leave a token out.

    Args:
      logits: float32 [batch, vocabulary]; `config.temperature` must be positive.

    Returns:
      float32 [batch, vocabulary].
    """
    logits = logits / config.temperature
    if config.top_k and config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < config.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32 [batch, vocabulary].
      key: of this step.

    Returns:
      int32 [batch].
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filtered_logits(logits, config), axis=-1).astype(jnp.int32)
