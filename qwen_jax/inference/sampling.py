"""The next token of each row, by the rules and the random numbers of that row.

Repetition penalty, temperature, top-k and top-p mean what transformers' `generate` gives them, and act in its order.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# A draw under top-k or top-p looks at so many of the most probable tokens, and sorts the vocabulary only if they are
# not enough.
CANDIDATES = 256
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Rules for drawing the next token.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy decoding).
      top_k: only the k most probable tokens; 0 keeps all.
      top_p: only the smallest set of most probable tokens whose probabilities sum to at least this; 1 keeps all.
      repetition_penalty: logits of tokens that the prompt or the continuation has are divided by it if positive, else
        multiplied; 1 leaves them as they are.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, found {self.temperature}")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be 0 (all) or a positive integer, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            hint = "for the most probable token alone, set temperature to 0"
            if self.temperature == 0:
                hint = "temperature 0 takes the most probable token, whatever top_p: leave it at 1"
            elif self.top_p > 0:
                hint = "1 samples from all tokens"
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}: {hint}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive (1: none), found {self.repetition_penalty}")


@flax.struct.dataclass
class RowSampling:
    """`SamplingConfig` and seed of each row of a batch: arrays [rows]."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], seeds: Sequence[int]) -> "RowSampling":
        """Arrays on the host, for rows with these configurations and seeds (0 to 2^32 - 1)."""
        return cls(
            temperature=np.asarray([c.temperature for c in configs], np.float32),
            top_k=np.asarray([min(c.top_k, np.iinfo(np.int32).max) for c in configs], np.int32),
            top_p=np.asarray([c.top_p for c in configs], np.float32),
            repetition_penalty=np.asarray([c.repetition_penalty for c in configs], np.float32),
            seed=np.asarray(seeds, np.uint32),
        )


def penalized_logits(logits: jax.Array, seen: jax.Array, penalty: jax.Array | np.ndarray) -> jax.Array:
    """Repetition penalty (Keskar et al. 2019): logits [rows, vocabulary] of tokens that `seen` (bool) has, lowered."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered_logits(logits: jax.Array, top_k: jax.Array | np.ndarray, top_p: jax.Array | np.ndarray) -> jax.Array:
    """Minus infinity where top-k, then top-p, leave a token out; tokens as probable as the last one stay.

    Args:
      logits: float32 [rows, vocabulary], divided by the temperature.
      top_k: int32 [rows], 0 for all.
      top_p: float32 [rows], 1 for all.
    """
    descending = -jnp.sort(-logits, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    least, _ = _least_kept(descending, total, top_k, top_p)
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _least_kept(descending, total, top_k, top_p):
    """The lowest logit [rows] that stays, and whether `descending`, the first of all, are enough to know.

    total: logarithm [rows] of the sum of the exponentials of all logits.
    """
    length = descending.shape[-1]
    last_of_k = jnp.take_along_axis(descending, jnp.clip(top_k - 1, 0, length - 1)[:, None], axis=-1)
    last_of_k = jnp.where((top_k == 0)[:, None], -jnp.inf, last_of_k)
    among_k = descending >= last_of_k
    within = jnp.where(among_k, descending, -jnp.inf)
    total = jnp.where(top_k == 0, total, jax.nn.logsumexp(within, axis=-1))
    probabilities = jnp.exp(within - total[:, None])
    sums = _running_sums(probabilities) if length <= CANDIDATES else jnp.cumsum(probabilities, axis=-1)
    before = sums - probabilities
    kept = among_k & ((before < top_p[:, None]) | (top_p == 1)[:, None])
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1)
    # What is as probable as the last that stays must be in sight, so one that is less probable must be.
    enough = (top_k <= length) & (descending[:, -1] < jnp.where(top_k == 0, least, last_of_k[:, 0]))
    return least, enough


def _draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """A token [rows] by the softmax of logits [rows, vocabulary]: inverse distribution function at `uniform` [rows].

    By blocks first, then within one: a running sum over the whole vocabulary would be most of a small model's step.
    """
    rows, vocabulary = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, -1, _BLOCK)

    def first_above(target, sums, parts):
        index = jnp.argmax((sums > target[:, None]) & (parts > 0), axis=-1)
        # Rounding may leave the target at the very end: then the last that has any weight.
        last = parts.shape[-1] - 1 - jnp.argmax((parts > 0)[:, ::-1], axis=-1)
        return jnp.where(sums[:, -1] > target, index, last)

    parts = jnp.sum(weights, axis=-1)
    sums = _running_sums(parts)
    target = uniform * sums[:, -1]
    block = first_above(target, sums, parts)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(sums - parts, block[:, None], axis=-1)[:, 0]
    return (block * _BLOCK + first_above(target - before, _running_sums(inside), inside)).astype(jnp.int32)


def _running_sums(x: jax.Array) -> jax.Array:
    """Sums [rows, n] of the first 1 to n of `x`, as a matrix product: `jnp.cumsum` compiles slowly on CPUs."""
    ones = jnp.triu(jnp.ones((x.shape[-1],) * 2, x.dtype))
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)


def _draw_filtered(logits, uniform, sampling: RowSampling):
    """(token [rows], its log-probability, whether the `CANDIDATES` most probable tokens were enough to know both)."""
    values, ids = jax.lax.top_k(logits, min(CANDIDATES, logits.shape[-1]))
    least, enough = _least_kept(values, jax.nn.logsumexp(logits, axis=-1), sampling.top_k, sampling.top_p)
    kept = jnp.where(values < least[:, None], -jnp.inf, values)
    chosen = _draw(kept, uniform)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0], _log_prob(kept, chosen), enough


def _log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logarithm of the probability [rows] of tokens [rows] under the softmax of logits [rows, vocabulary]."""
    taken = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return taken - jax.nn.logsumexp(logits, axis=-1)


def _sampled(logits, sampling: RowSampling, positions) -> tuple[jax.Array, jax.Array]:
    """(token [rows], log-probability [rows] of the distribution that it was drawn from)."""
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(sampling.seed, positions)
    uniform = jax.vmap(jax.random.uniform)(keys)
    filters = (sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))
    nothing = jnp.zeros(uniform.shape, jnp.int32), jnp.zeros(uniform.shape, jnp.float32)
    *filtered, enough = jax.lax.cond(
        jnp.any(filters), lambda: _draw_filtered(logits, uniform, sampling), lambda: (*nothing, filters)
    )
    # Which way a row's token is drawn depends on the row alone, never on the rows beside it.
    narrow = filters & enough
    wide = jax.lax.cond(
        jnp.any(filters & ~enough),
        lambda: jnp.where(filters[:, None], filtered_logits(logits, sampling.top_k, sampling.top_p), logits),
        lambda: logits,
    )

    def draw_wide():
        token = _draw(wide, uniform)
        return token, _log_prob(wide, token)

    whole = jax.lax.cond(jnp.all(narrow | (sampling.temperature == 0)), lambda: nothing, draw_wide)
    token, log_prob = (jnp.where(narrow, one, other) for one, other in zip(filtered, whole, strict=True))
    return token, log_prob


def next_tokens(
    logits: jax.Array, seen: jax.Array, sampling: RowSampling, positions: jax.Array, greedy: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of each row, and its log-probability under the model and under the rules that drew it.

    Args:
      logits: float32 [rows, vocabulary], as the model gives them.
      seen: bool [rows, vocabulary], whether each row has the token so far.
      sampling: of the rows.
      positions: int32 [rows], of the new tokens. The random numbers are a function of seed and position.
      greedy: whether all temperatures are known to be 0: sampling is then not compiled.

    Returns:
      (token int32 [rows], log-probability float32 [rows], behavior log-probability float32 [rows]). The first
      log-probability is of the softmax of `logits`, before penalty, temperature and filters; the second of the
      distribution after them, 0 at temperature 0.
    """
    penalized = jax.lax.cond(
        jnp.any(sampling.repetition_penalty != 1),
        lambda: penalized_logits(logits, seen, sampling.repetition_penalty),
        lambda: logits,
    )
    tokens = jnp.argmax(penalized, axis=-1).astype(jnp.int32)
    behavior = jnp.zeros(tokens.shape, jnp.float32)
    if not greedy:
        drawn, drawn_log_prob = _sampled(penalized, sampling, positions)
        tokens = jnp.where(sampling.temperature > 0, drawn, tokens)
        behavior = jnp.where(sampling.temperature > 0, drawn_log_prob, behavior)
    return tokens, _log_prob(logits, tokens), behavior
