"""Log-probabilities of given tokens, and their cross-entropy, in chunks of tokens: all logits never exist at once.

Both take normed hidden states and the output projection, and work on the mesh in use: rows and positions stay on their
devices, the vocabulary is split over `tensor`.

Einsum letters: a row shards, r rows of a shard, c length shards, l positions of a chunk, d hidden, v vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.models.nucleus import nucleus_threshold
from qwen_jax.models.ops import matmul_precision
from qwen_jax.sharding import constrain, num_shards, split_shards, sum_shards

# Number of logits that exist on a device at a time, in float32 and again in the compute dtype: 1,024 tokens of the
# released vocabulary. Those of a whole batch would be the largest array of the step.
LOGITS_AT_A_TIME = 1024 * 152064


class TokenStatistics(NamedTuple):
    """Statistics of given tokens under a model, each [batch, length].

    Attributes:
      log_probs: float32, logarithm of the probability of the token, in nats.
      most_likely: float32, 1 where no other token has a larger logit, else 0. It has no gradient.
      entropy: float32, of the distribution over the vocabulary, in nats; None unless requested.
      nucleus_log_probs: float32, logarithm of the probability of the token among those of the nucleus alone; minus
        infinity, without a gradient, where the token is outside. None unless requested.
    """

    log_probs: jax.Array
    most_likely: jax.Array
    entropy: jax.Array | None = None
    nucleus_log_probs: jax.Array | None = None


def output_logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Float32 logits [..., vocabulary] of hidden states [..., hidden] and an output projection [hidden, vocabulary]."""
    return jnp.einsum(
        "...d,dv->...v", hidden, kernel, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32
    )


def token_log_probs(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, temperature=1.0) -> jax.Array:
    """Logarithm of the probability of each target, float32 [batch, length]; arguments as in `token_statistics`."""
    return token_statistics(hidden, kernel, targets, temperature=temperature).log_probs


def token_statistics(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    temperature=1.0,
    with_entropy: bool = False,
    top_p: float | None = None,
) -> TokenStatistics:
    """Log-probability of each target under the softmax of logits / temperature, with further statistics.

    The backward pass takes any cotangent, computes the logits of a chunk again, and keeps of the forward pass a few
    numbers for each token. Gradients go to `hidden` and `kernel`; the nucleus itself counts as constant.

    Args:
      hidden: [batch, length, hidden] in the compute dtype: normed final hidden states.
      kernel: [hidden, vocabulary].
      targets: int32 [batch, length], each in [0, vocabulary): the token that each position predicts.
      temperature: positive scalar; the logits are divided by it in float32.
      with_entropy: whether to compute the entropy, too.
      top_p: of the nucleus that `nucleus_log_probs` are of (`nucleus_threshold`); 1 is the whole vocabulary. None
        leaves them out.
    """
    filtered = top_p if top_p is not None and top_p < 1 else None
    found = _statistics(with_entropy, filtered, hidden, kernel.astype(hidden.dtype), targets, jnp.float32(temperature))
    return found if top_p is None or filtered else found._replace(nucleus_log_probs=found.log_probs)


def cross_entropy_sums(hidden, kernel, targets, weights) -> dict[str, jax.Array]:
    """Weighted sums of the cross-entropy and of correct predictions, in chunks along the length.

    The gradients are computed together with the loss, while a chunk's logits are there: neither are all logits ever
    kept, nor is any computed twice. No gradient goes to `weights`, and "correct" has none.

    Args:
      hidden: [batch, length, hidden] in the compute dtype.
      kernel: [hidden, vocabulary].
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 leaves a position out.

    Returns:
      float32 scalars: "loss" (nats), "correct" and "weight".
    """
    loss, correct = _cross_entropy(hidden, kernel.astype(hidden.dtype), targets, weights)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights)}


def _chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """The largest divisor of `length` whose chunk of `rows` rows has at most LOGITS_AT_A_TIME logits; at least 1."""
    longest = max(LOGITS_AT_A_TIME // (rows * vocab_size), 1)
    return max(size for size in range(1, min(length, longest) + 1) if length % size == 0)


def _over_chunks(one_chunk, carry, hidden: jax.Array, vocab_size: int):
    """The carry after all chunks of `hidden`, which has the axes of `split_shards`.

    `one_chunk(carry, start, slice)` gives the next carry; `slice` cuts the chunk out of an array whose axis 3
    has the positions.
    """
    _, rows, _, positions, _ = hidden.shape
    chunk = _chunk_length(rows, positions, vocab_size // num_shards("vocab"))

    def body(carry, start):
        return one_chunk(carry, start, lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=3)), None

    starts = jnp.arange(0, positions, chunk)
    carry, _ = body(carry, starts[0]) if chunk == positions else jax.lax.scan(body, carry, starts)
    return carry


def _chunk_logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return constrain(output_logits(hidden, kernel), "batch", None, "length", None, "vocab")


def _target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


class _Gradients(NamedTuple):
    """Gradients during the pass over chunks: by the hidden states, and by the kernel of each shard.

    hidden: replaces the hidden states chunk by chunk, as they are not read again: one array of the batch's width less.
    kernel: float32 [row shards, length shards, hidden, vocabulary].
    """

    hidden: jax.Array
    kernel: jax.Array

    @classmethod
    def start(cls, hidden: jax.Array, vocab_size: int) -> "_Gradients":
        row_shards, _, length_shards, _, width = hidden.shape
        kernel = jnp.zeros((row_shards, length_shards, width, vocab_size), jnp.float32)
        return cls(hidden, constrain(kernel, "batch", "length", None, "vocab"))

    def add(self, start: jax.Array, hidden: jax.Array, kernel: jax.Array, error: jax.Array) -> "_Gradients":
        """Adds the gradients of a chunk, whose gradient by the logits is `error` in the compute dtype."""
        precision = matmul_precision(hidden.dtype)
        by_hidden = jnp.einsum("arclv,dv->arcld", error, kernel, precision=precision)
        by_kernel = self.kernel + jnp.einsum(
            "arcld,arclv->acdv", hidden, error, precision=precision, preferred_element_type=jnp.float32
        )
        return _Gradients(
            jax.lax.dynamic_update_slice_in_dim(self.hidden, by_hidden, start, axis=3),
            constrain(by_kernel, "batch", "length", None, "vocab"),
        )

    def finish(self, dtype) -> tuple[jax.Array, jax.Array]:
        """([batch, length, hidden], [hidden, vocabulary]), summed over the shards in `dtype`."""
        # Reduced before the backward pass of the layers begins: XLA would keep the whole of it until that is over.
        kernel = constrain(sum_shards(self.kernel, dtype), "embed", "vocab")
        hidden, kernel = jax.lax.optimization_barrier((self.hidden, kernel))
        row_shards, rows, length_shards, positions, width = hidden.shape
        return hidden.reshape(row_shards * rows, length_shards * positions, width), kernel


@jax.custom_vjp
def _cross_entropy(hidden, kernel, targets, weights):
    return _cross_entropy_in_chunks(hidden, kernel, targets, weights, with_gradients=False)[0]


def _cross_entropy_forward(hidden, kernel, targets, weights):
    return _cross_entropy_in_chunks(hidden, kernel, targets, weights, with_gradients=True)


def _cross_entropy_backward(gradients, cotangents):
    # The cotangent is 1 in training, and XLA then leaves the products out.
    hidden, kernel = (gradient * cotangents[0].astype(gradient.dtype) for gradient in gradients)
    return hidden, kernel, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cross_entropy_in_chunks(hidden, kernel, targets, weights, *, with_gradients: bool):
    """((loss sum, correct sum), gradients of the loss sum by hidden and kernel in their dtypes, or None)."""
    vocab_size = kernel.shape[1]
    hidden, targets, weights = split_shards(hidden), split_shards(targets), split_shards(weights)

    def one_chunk(carry, start, cut):
        sums, gradients = carry
        h, t, w = cut(gradients.hidden if with_gradients else hidden), cut(targets), cut(weights)
        logits = _chunk_logits(h, kernel)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = _target_logits(logits, t)
        correct = picked >= jnp.max(logits, axis=-1)
        sums = sums + jnp.stack([jnp.sum((log_normalizer - picked) * w), jnp.sum(correct * w)])
        if with_gradients:
            probabilities = jnp.exp(logits - log_normalizer[..., None])
            of_target = jnp.arange(vocab_size) == t[..., None]
            error = ((probabilities - of_target) * w[..., None]).astype(kernel.dtype)
            gradients = gradients.add(start, h, kernel, error)
        return sums, gradients

    gradients = _Gradients.start(hidden, vocab_size) if with_gradients else None
    sums, gradients = _over_chunks(one_chunk, (jnp.zeros(2, jnp.float32), gradients), hidden, vocab_size)
    return tuple(sums), gradients.finish(kernel.dtype) if with_gradients else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(with_entropy: bool, top_p: float | None, hidden, kernel, targets, temperature) -> TokenStatistics:
    return _statistics_forward(with_entropy, top_p, hidden, kernel, targets, temperature)[0]


class _Known(NamedTuple):
    """What the backward pass keeps of the forward pass, each [batch, length]; None where it is not needed.

    log_normalizer: of all logits.
    entropy: of the distribution.
    threshold: logits above it are in the nucleus.
    nucleus_normalizer: of the logits in the nucleus.
    """

    log_normalizer: jax.Array
    entropy: jax.Array | None = None
    threshold: jax.Array | None = None
    nucleus_normalizer: jax.Array | None = None


def _chunk_statistics(with_entropy, top_p, logits, targets) -> tuple[TokenStatistics, _Known]:
    """The statistics of a chunk, whose logits are divided by the temperature, and what its backward pass needs."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = _target_logits(logits, targets)
    most_likely = (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    found, known = TokenStatistics(picked - log_normalizer, most_likely), _Known(log_normalizer)
    if with_entropy:
        probabilities = jnp.exp(logits - log_normalizer[..., None])
        entropy = log_normalizer - jnp.sum(probabilities * logits, axis=-1)
        found, known = found._replace(entropy=entropy), known._replace(entropy=entropy)
    if top_p is not None:
        threshold = nucleus_threshold(logits, log_normalizer, top_p)
        normalizer = jax.nn.logsumexp(jnp.where(logits > threshold[..., None], logits, -jnp.inf), axis=-1)
        inside = jnp.where(picked > threshold, picked - normalizer, -jnp.inf)
        found = found._replace(nucleus_log_probs=inside)
        known = known._replace(threshold=threshold, nucleus_normalizer=normalizer)
    return found, known


def _statistics_forward(with_entropy, top_p, hidden, kernel, targets, temperature):
    parts, target_parts = split_shards(hidden), split_shards(targets)

    def one_chunk(carry, start, cut):
        logits = _chunk_logits(cut(parts), kernel) / temperature
        found = _chunk_statistics(with_entropy, top_p, logits, cut(target_parts))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=3), carry, found
        )

    empty = constrain(jnp.zeros(target_parts.shape, jnp.float32), "batch", None, "length", None)
    entropy, filtered = (empty if with_entropy else None), (empty if top_p is not None else None)
    carry = TokenStatistics(empty, empty, entropy, filtered), _Known(empty, entropy, filtered, filtered)
    carry = _over_chunks(one_chunk, carry, parts, kernel.shape[1])
    found, known = jax.tree.map(lambda whole: whole.reshape(targets.shape), carry)
    return found, (hidden, kernel, targets, temperature, known)


def _statistics_backward(with_entropy, top_p, residuals, cotangents: TokenStatistics):
    hidden, kernel, targets, temperature, known = residuals
    vocab_size = kernel.shape[1]
    by_token = jax.tree.map(split_shards, (targets, known, cotangents))

    def one_chunk(gradients, start, cut):
        h = cut(gradients.hidden)
        logits = _chunk_logits(h, kernel) / temperature
        t, k, by = jax.tree.map(lambda x: cut(x)[..., None], by_token)
        log_probabilities = logits - k.log_normalizer
        probabilities = jnp.exp(log_probabilities)
        of_target = jnp.arange(vocab_size) == t
        error = by.log_probs * (of_target - probabilities)
        if with_entropy:
            error = error - by.entropy * probabilities * (log_probabilities + k.entropy)
        if top_p is not None:
            inside = logits > k.threshold
            among = jnp.where(inside, jnp.exp(logits - k.nucleus_normalizer), 0.0)
            counts = jnp.any(of_target & inside, axis=-1, keepdims=True)
            error = error + jnp.where(counts, by.nucleus_log_probs, 0.0) * (of_target - among)
        return gradients.add(start, h, kernel, (error / temperature).astype(kernel.dtype))

    parts = split_shards(hidden)
    gradients = _over_chunks(one_chunk, _Gradients.start(parts, vocab_size), parts, vocab_size)
    return *gradients.finish(kernel.dtype), None, None


_statistics.defvjp(_statistics_forward, _statistics_backward)
