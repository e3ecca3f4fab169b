"""The next token of each row, by the rules and the random numbers of that row.

Repetition penalty, temperature, top-k, top-p and min-p mean what transformers' `generate` gives them, and act in its
order. Presence and frequency penalty mean what OpenAI's API gives them, and act after the repetition penalty; added
biases act before it.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.inference.constraints import BITS

# A draw under top-k or top-p looks at so many of the most probable tokens, and sorts the vocabulary only if they are
# not enough.
CANDIDATES = 256
_BLOCK = 512
# Of the penalties of OpenAI's API, and of the biases of its tokens.
LARGEST_PENALTY, LARGEST_BIAS = 2.0, 100.0
# Of temperatures and repetition penalties: by others, float32 has no number for a logit.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-10, 1e10
# The most probable tokens whose log-probabilities are told.
MOST_LIKELY = 20


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Rules for drawing the next token.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy decoding).
      top_k: only the k most probable tokens; 0 keeps all.
      top_p: only the smallest set of most probable tokens whose probabilities sum to at least this; 1 keeps all.
      repetition_penalty: logits of tokens that the prompt or the continuation has are divided by it if positive, else
        multiplied; 1 leaves them as they are.
      min_p: only tokens that are at least this times as probable as the most probable one; 0 keeps all.
      presence_penalty: subtracted from the logits of tokens that the continuation has; 0 leaves them as they are. The
        prompt does not count.
      frequency_penalty: the same, times how often the continuation has the token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        if self.temperature != 0 and not SMALLEST_FACTOR <= self.temperature <= LARGEST_FACTOR:
            limits = f"from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}"
            raise ValueError(f"temperature must be 0 (greedy) or {limits}, found {self.temperature}")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be 0 (all) or a positive integer, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            hint = "for the most probable token alone, set temperature to 0"
            if self.temperature == 0:
                hint = "temperature 0 takes the most probable token, whatever top_p: leave it at 1"
            elif self.top_p > 0:
                hint = "1 samples from all tokens"
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}: {hint}")
        if not SMALLEST_FACTOR <= self.repetition_penalty <= LARGEST_FACTOR:
            limits = f"from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}"
            raise ValueError(f"repetition_penalty must be {limits} (1: none), found {self.repetition_penalty}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 (all tokens) to 1, found {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -LARGEST_PENALTY <= value <= LARGEST_PENALTY:
                raise ValueError(
                    f"{name} must be from {-LARGEST_PENALTY} to {LARGEST_PENALTY} (0: none), found {value}"
                )

    @property
    def counts(self) -> bool:
        """Whether it goes by how often the continuation has each token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@flax.struct.dataclass
class TokenBias:
    """Numbers that are added to the logits of some tokens of each row.

    ids: int32 [rows, width], filled up with ids past the vocabulary, which are dropped.
    values: float32 [rows, width].
    """

    ids: jax.Array | np.ndarray
    values: jax.Array | np.ndarray


@flax.struct.dataclass
class RowSampling:
    """`SamplingConfig` and seed of each row of a batch: arrays [rows].

    Arrays in the place of None make another program of those that take them.

    bias: of the rows; None: no row has any.
    allowed: uint32 [rows, words], as `constraints.Matcher` gives them, which tokens each row may draw next; None: any.
    """

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    presence_penalty: jax.Array | np.ndarray
    frequency_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    bias: TokenBias | None = None
    allowed: jax.Array | np.ndarray | None = None

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], seeds: Sequence[int]) -> "RowSampling":
        """Arrays on the host, for rows with these configurations and seeds (0 to 2^32 - 1)."""

        def floats(name: str) -> np.ndarray:
            return np.asarray([getattr(config, name) for config in configs], np.float32)

        return cls(
            temperature=floats("temperature"),
            top_k=np.asarray([min(c.top_k, np.iinfo(np.int32).max) for c in configs], np.int32),
            top_p=floats("top_p"),
            repetition_penalty=floats("repetition_penalty"),
            min_p=floats("min_p"),
            presence_penalty=floats("presence_penalty"),
            frequency_penalty=floats("frequency_penalty"),
            seed=np.asarray(seeds, np.uint32),
        )


def penalized_logits(logits: jax.Array, seen: jax.Array, penalty: jax.Array | np.ndarray) -> jax.Array:
    """Repetition penalty (Keskar et al. 2019): logits [rows, vocabulary] of tokens that `seen` (bool) has, lowered."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def counted_logits(logits: jax.Array, counts: jax.Array, sampling: RowSampling) -> jax.Array:
    """Presence and frequency penalty (OpenAI's API): logits [rows, vocabulary] of tokens that came, lowered.

    Args:
      counts: int32 [rows, vocabulary], how often each row has generated the token.
    """
    presence, frequency = (jnp.asarray(x)[:, None] for x in (sampling.presence_penalty, sampling.frequency_penalty))
    return logits - jnp.where(counts > 0, presence, 0.0) - frequency * counts


def biased_logits(logits: jax.Array, bias: TokenBias) -> jax.Array:
    """Logits [rows, vocabulary] with the biases of their rows."""
    return logits.at[jnp.arange(len(logits))[:, None], bias.ids].add(bias.values, mode="drop")


def allowed_logits(logits: jax.Array, allowed: jax.Array | np.ndarray) -> jax.Array:
    """Minus infinity for the tokens of logits [rows, vocabulary] whose bit in `allowed` uint32 [rows, words] is 0."""
    bits = (jnp.asarray(allowed)[..., None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def filtered_logits(logits: jax.Array, sampling: RowSampling) -> jax.Array:
    """Minus infinity where top-k, then top-p, then min-p leave a token out; those as probable as the last one stay.

    Args:
      logits: float32 [rows, vocabulary], divided by the temperature.
    """
    descending = -jnp.sort(-logits, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    least, _ = _least_kept(descending, total, sampling)
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _least_kept(descending, total, sampling: RowSampling):
    """The lowest logit [rows] that stays, and whether `descending`, the first of all, are enough to know.

    total: logarithm [rows] of the sum of the exponentials of all logits.
    """
    top_k, top_p = jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p)
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
    # The most probable token stays by any top-p, even by one that is 0 in float32.
    least = jnp.minimum(jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1), descending[:, 0])
    # Probabilities are compared with the largest one, which always stays: the filters before make no difference.
    least = jnp.maximum(least, descending[:, 0] + jnp.log(sampling.min_p))
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
    least, enough = _least_kept(values, jax.nn.logsumexp(logits, axis=-1), sampling)
    kept = jnp.where(values < least[:, None], -jnp.inf, values)
    chosen = _draw(kept, uniform)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0], log_prob_of(kept, chosen), enough


def log_prob_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logarithm of the probability [rows] of tokens [rows] under the softmax of logits [rows, vocabulary]."""
    taken = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return taken - jax.nn.logsumexp(logits, axis=-1)


def _sampled(logits, sampling: RowSampling, positions) -> tuple[jax.Array, jax.Array]:
    """(token [rows], log-probability [rows] of the distribution that it was drawn from)."""
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(sampling.seed, positions)
    uniform = jax.vmap(jax.random.uniform)(keys)
    filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    filters &= sampling.temperature > 0
    nothing = jnp.zeros(uniform.shape, jnp.int32), jnp.zeros(uniform.shape, jnp.float32)
    *filtered, enough = jax.lax.cond(
        jnp.any(filters), lambda: _draw_filtered(logits, uniform, sampling), lambda: (*nothing, filters)
    )
    # Which way a row's token is drawn depends on the row alone, never on the rows beside it.
    narrow = filters & enough
    wide = jax.lax.cond(
        jnp.any(filters & ~enough),
        lambda: jnp.where(filters[:, None], filtered_logits(logits, sampling), logits),
        lambda: logits,
    )

    def draw_wide():
        token = _draw(wide, uniform)
        return token, log_prob_of(wide, token)

    whole = jax.lax.cond(jnp.all(narrow | (sampling.temperature == 0)), lambda: nothing, draw_wide)
    token, log_prob = (jnp.where(narrow, one, other) for one, other in zip(filtered, whole, strict=True))
    return token, log_prob


def next_tokens(
    logits: jax.Array,
    seen: jax.Array,
    sampling: RowSampling,
    positions: jax.Array,
    greedy: bool = False,
    counts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of each row, and its log-probability under the model and under the rules that drew it.

    Args:
      logits: float32 [rows, vocabulary], as the model gives them.
      seen: bool [rows, vocabulary], whether each row has the token so far.
      sampling: of the rows.
      positions: int32 [rows], of the new tokens. The random numbers are a function of seed and position.
      greedy: whether all temperatures are known to be 0: sampling is then not compiled.
      counts: int32 [rows, vocabulary], how often each row has generated the token; None: no row has a presence or
        frequency penalty, or none has generated anything.

    Returns:
      (token int32 [rows], log-probability float32 [rows], behavior log-probability float32 [rows]). The first
      log-probability is of the softmax of `logits`, before biases, penalties, temperature and filters; the second of
      the distribution after them, 0 at temperature 0.
    """
    adjusted = logits if sampling.bias is None else biased_logits(logits, sampling.bias)
    adjusted = jax.lax.cond(
        jnp.any(sampling.repetition_penalty != 1),
        lambda: penalized_logits(adjusted, seen, sampling.repetition_penalty),
        lambda: adjusted,
    )
    if counts is not None:
        adjusted = counted_logits(adjusted, counts, sampling)
    if sampling.allowed is not None:
        adjusted = allowed_logits(adjusted, sampling.allowed)
    tokens = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    behavior = jnp.zeros(tokens.shape, jnp.float32)
    if not greedy:
        drawn, drawn_log_prob = _sampled(adjusted, sampling, positions)
        tokens = jnp.where(sampling.temperature > 0, drawn, tokens)
        behavior = jnp.where(sampling.temperature > 0, drawn_log_prob, behavior)
    return tokens, log_prob_of(logits, tokens), behavior


def most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `MOST_LIKELY` most probable tokens of logits [rows, vocabulary]: (ids, log-probabilities), descending.

    The log-probabilities are such that the one of a token equals what `next_tokens` gives for it.
    """
    values, ids = jax.lax.top_k(logits, min(MOST_LIKELY, logits.shape[-1]))
    return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1)[:, None]
