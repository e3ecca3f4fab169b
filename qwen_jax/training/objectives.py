"""What is minimised. An objective is `(model, params, batch, rng) -> (loss_sum, sums)`.

`loss_sum` is a float32 sum over the batch and `sums` a dict of float32 sums with at least `"weight"`, the number that
`loss_sum` is to be divided by. Sums, not means: gradient accumulation and several hosts then give exactly the mean over
the whole batch, however unevenly the loss-carrying tokens are spread.
"""

import jax
import jax.numpy as jnp

from qwen_jax.models.log_probs import cross_entropy_sums
from qwen_jax.models.transformer import Qwen


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
