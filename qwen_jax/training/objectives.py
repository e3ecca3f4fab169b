"""What is minimised. An objective is `(model, params, batch, rng) -> (loss_sum, sums)`.

`loss_sum` is a float32 sum over the batch and `sums` a dict of float32 sums with at least `"weight"`, the number that
`loss_sum` is to be divided by. Sums, not means: gradient accumulation and several hosts then give exactly the mean over
the whole batch, however unevenly the loss-carrying tokens are spread.
"""

import jax
import jax.numpy as jnp

from qwen_jax.models.ops import matmul_precision
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import apart, constrain, num_shards, sum_shards

# So many logits exist on a device at a time, in float32 and again in the compute dtype: 1,024 tokens of the released
# vocabulary. Those of a whole batch would be the largest array of the step.
LOGITS_AT_A_TIME = 1024 * 152064


def _chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """The largest divisor of `length` whose chunk of `rows` rows has at most LOGITS_AT_A_TIME logits; at least 1."""
    longest = max(LOGITS_AT_A_TIME // (rows * vocab_size), 1)
    return max(size for size in range(1, min(length, longest) + 1) if length % size == 0)


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
    batch, length, width = hidden.shape
    vocab_size = kernel.shape[1]
    hidden, targets, weights = apart(hidden), apart(targets), apart(weights)
    row_shards, rows, length_shards, positions, _ = hidden.shape
    chunk = _chunk_length(rows, positions, vocab_size // num_shards("vocab"))
    precision = matmul_precision(hidden.dtype)

    def one_chunk(carry, start):
        sums, hidden, kernel_gradient = carry
        h, t, w = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=3) for x in (hidden, targets, weights))
        logits = jnp.einsum("arcld,dv->arclv", h, kernel, precision=precision, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", None, "length", None, "vocab")
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        correct = picked >= jnp.max(logits, axis=-1)
        sums = sums + jnp.stack([jnp.sum((log_normaliser - picked) * w), jnp.sum(correct * w)])
        if not with_gradients:
            return (sums, hidden, None), None
        probabilities = jnp.exp(logits - log_normaliser[..., None])
        of_target = jnp.arange(vocab_size) == t[..., None]
        error = ((probabilities - of_target) * w[..., None]).astype(kernel.dtype)
        h_gradient = jnp.einsum("arclv,dv->arcld", error, kernel, precision=precision)
        # In the place of the chunk itself, which nobody reads again: one array of the batch's width less.
        hidden = jax.lax.dynamic_update_slice_in_dim(hidden, h_gradient, start, axis=3)
        kernel_gradient = kernel_gradient + jnp.einsum(
            "arcld,arclv->acdv", h, error, precision=precision, preferred_element_type=jnp.float32
        )
        kernel_gradient = constrain(kernel_gradient, "batch", "length", None, "vocab")
        return (sums, hidden, kernel_gradient), None

    kernel_gradient = None
    if with_gradients:
        kernel_gradient = jnp.zeros((row_shards, length_shards, width, vocab_size), jnp.float32)
        kernel_gradient = constrain(kernel_gradient, "batch", "length", None, "vocab")
    carry = (jnp.zeros(2, jnp.float32), hidden, kernel_gradient)
    starts = jnp.arange(0, positions, chunk)
    (sums, hidden_gradient, kernel_gradient), _ = (
        one_chunk(carry, starts[0]) if chunk == positions else jax.lax.scan(one_chunk, carry, starts)
    )
    if not with_gradients:
        return tuple(sums), None
    # Reduced before the backward pass of the layers begins: XLA would keep the whole of it until that is over.
    kernel_gradient = constrain(sum_shards(kernel_gradient, kernel.dtype), "embed", "vocab")
    hidden_gradient, kernel_gradient = jax.lax.optimization_barrier((hidden_gradient, kernel_gradient))
    return tuple(sums), (hidden_gradient.reshape(batch, length, width), kernel_gradient)


def next_token_loss(model: Qwen, params, batch: dict[str, jax.Array], rng: jax.Array | None):
    """Next-token prediction (report 2.4; with 0/1 weights, SFT of report 3.1).

    Position t predicts token t + 1 of the same row, if that token carries loss; the last position predicts nothing,
    as in the released training code.

    Args:
      batch: "tokens" int32 [batch, length]; "loss_weights" float32 [batch, length], of each token as a target; and
        optionally "segment_ids" and "positions", int32 [batch, length], for packed rows.
      rng: key for dropout, or None for a deterministic pass.

    Returns:
      (loss sum in nats, {"weight": loss-carrying tokens, "correct": how many of them were the most probable}).
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    hidden = model.apply(
        {"params": params},
        tokens,
        positions=batch.get("positions"),
        segment_ids=segment_ids,
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
        method=Qwen.hidden_states,
    )
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(batch["loss_weights"].astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
    if segment_ids is not None:
        weights = weights * (segment_ids == jnp.roll(segment_ids, -1, axis=1))
    kernel = model.apply({"params": params}, method=Qwen.output_kernel)
    sums = cross_entropy_sums(hidden, kernel, targets, weights)
    loss = sums.pop("loss")
    return loss, sums
