"""What is minimised. An objective is `(model, params, batch, rng) -> (loss_sum, sums)`.

`loss_sum` is a float32 sum over the batch and `sums` a dict of float32 sums with at least `"weight"`, the number that
`loss_sum` is to be divided by. Sums, not means: gradient accumulation and several hosts then give exactly the mean over
the whole batch, however unevenly the loss-carrying tokens are spread.
"""

import jax
import jax.numpy as jnp

from qwen_jax.models.layers import matmul_precision
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import constrain

# Logits of this many positions of each row exist at a time. The whole array, [batch, length, 151,936] in float32, would
# be the largest of the step.
LOSS_CHUNK = 256


def _chunk_length(length: int, vocab_size: int) -> int:
    if vocab_size <= 8192:
        return length
    return max(size for size in range(1, min(length, LOSS_CHUNK) + 1) if length % size == 0)


def cross_entropy_sums(hidden, kernel, targets, weights) -> dict[str, jax.Array]:
    """Weighted sums of the cross-entropy and of correct predictions, in chunks along the length.

    Args:
      hidden: [batch, length, hidden] in the compute dtype.
      kernel: [hidden, vocabulary], float32.
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 leaves a position out.

    Returns:
      float32 scalars: "loss" (nats), "correct" and "weight".
    """
    batch, length, _ = hidden.shape
    chunk = _chunk_length(length, kernel.shape[1])
    kernel = kernel.astype(hidden.dtype)

    def sums_of(hidden, targets, weights):
        logits = jnp.einsum(
            "bld,dv->blv", hidden, kernel, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32
        )
        logits = constrain(logits, "batch", "length", "vocab")
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        correct = picked >= jnp.max(logits, axis=-1)
        return jnp.stack([
            jnp.sum((log_normaliser - picked) * weights), jnp.sum(correct * weights), jnp.sum(weights)
        ])

    if chunk == length:
        total = sums_of(hidden, targets, weights)
    else:
        def split(x):
            return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

        total, _ = jax.lax.scan(
            # Without checkpoint, every chunk's logits would be kept for the backward pass.
            lambda carry, xs: (carry + jax.checkpoint(sums_of)(*xs), None), jnp.zeros(3, jnp.float32),
            (split(hidden), split(targets), split(weights)),
        )
    return {"loss": total[0], "correct": total[1], "weight": total[2]}


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
        {"params": params}, tokens, positions=batch.get("positions"), segment_ids=segment_ids,
        deterministic=rng is None, rngs=None if rng is None else {"dropout": rng}, method=Qwen.hidden_states,
    )
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(batch["loss_weights"].astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
    if segment_ids is not None:
        weights = weights * (segment_ids == jnp.roll(segment_ids, -1, axis=1))
    kernel = params["token_embedding"].T if model.config.tie_embeddings else params["output"]
    sums = cross_entropy_sums(hidden, kernel, targets, weights)
    loss = sums.pop("loss")
    return loss, sums
