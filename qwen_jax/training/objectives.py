"""Next-token prediction and its loss; `qwen_jax.training.objective` has the interface of objectives."""

import math

import jax
import jax.numpy as jnp

from qwen_jax.models.log_probs import cross_entropy_sums
from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective


def next_token_loss(model: Model, params, batch: dict[str, jax.Array], rng: jax.Array | None):
    """Next-token prediction (report 2.4; with 0/1 weights, SFT of report 3.1).

    Position t predicts token t + 1 of the same row, if that token carries loss; the last position predicts nothing,
    as in the released training code.

    Args:
      batch: "tokens" int32 [batch, length]; "loss_weights" float32 [batch, length], of each token as a target; and
        optionally "segment_ids" and "positions", int32 [batch, length], for packed rows, and "images", the pictures of
        each row in the order of its text, for a model that takes them.
      rng: key for dropout, or None for a deterministic pass.

    Returns:
      (loss sum in nats, {"weight": loss-carrying tokens, "correct": how many of them were the most probable, and
      "images": number of pictures, where the batch has the column}).
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    pictures = {"images": batch["images"]} if "images" in batch else {}
    hidden = model.apply(
        {"params": params},
        tokens,
        positions=batch.get("positions"),
        segment_ids=segment_ids,
        **pictures,
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
        method="hidden_states",
    )
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.roll(batch["loss_weights"].astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
    if segment_ids is not None:
        weights = weights * (segment_ids == jnp.roll(segment_ids, -1, axis=1))
    kernel = model.apply({"params": params}, method="output_kernel")
    sums = cross_entropy_sums(hidden, kernel, targets, weights)
    loss = sums.pop("loss")
    if pictures:
        sums["images"] = model.apply({"params": params}, tokens, method="count_images")
    return loss, sums


def next_token_prediction() -> Objective:
    """The objective of pretraining, and of SFT with loss weights: mean loss in nats per token that carries loss.

    Held-out examples are reported with perplexity and bits per UTF-8 byte, so they must know their `bytes_per_token`.
    """
    return Objective(next_token_loss, _token_metrics, _held_out_metrics, _held_out_text, counts=("images",))


def _token_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"accuracy": sums["correct"] / sums["weight"]}


def _held_out_metrics(sums: dict[str, float], examples) -> dict[str, float]:
    loss = sums["loss"] / sums["weight"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / examples.bytes_per_token,
    }


def _held_out_text(metrics: dict[str, float]) -> str:
    return (
        f"held-out loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}, "
        f"{metrics['bits_per_byte']:.4f} bits per byte"
    )
