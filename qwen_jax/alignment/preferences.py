"""Preference models (report 3.2.1): the reward of a conversation, and the loss on pairs of them.

A row holds pairs of conversations with one prompt: pair k, counted from 1, is segments 2k - 1 (the chosen side) and 2k
(the rejected one). Each side is a whole conversation; the tokens of its response have weight 1 in `loss_weights`. The
reward is read at the last of them, `<|im_end|>`: the report reads it "at a specific end token" and names none, and a
token that is not the pad token is found again by other software (`Qwen2ForSequenceClassification`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective


class PairValues(NamedTuple):
    """One number for each side of each pair; arrays are [batch, pairs], with length // 2 places for pairs.

    Attributes:
      chosen, rejected: float32; 0 where there is no pair.
      whole: bool, whether the place holds a pair with a response on both sides.
      incomplete: bool, whether it holds a pair that lacks the response of a side, or a side.
    """

    chosen: jax.Array
    rejected: jax.Array
    whole: jax.Array
    incomplete: jax.Array


def response_ends(loss_weights: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Where rewards are read: bool [batch, length], True at the last token with weight in each segment.

    Args:
      loss_weights: [batch, length], not 0 on the tokens of responses.
      segment_ids: int32 [batch, length], ascending along a row, 0 in the filling.
    """
    length = segment_ids.shape[1]
    weighted = (loss_weights > 0) & (segment_ids > 0)
    places = jnp.where(weighted, jnp.arange(length), length)
    # The next token with weight: the smallest place to the right.
    next_place = jnp.roll(jax.lax.cummin(places, axis=1, reverse=True), -1, axis=1).at[:, -1].set(length)
    next_segment = jnp.take_along_axis(segment_ids, jnp.minimum(next_place, length - 1), axis=1)
    return weighted & ((next_place == length) | (next_segment != segment_ids))


def sum_by_segment(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sums of `values` [batch, length] over each segment: float32 [batch, segments + 1], the filling's at 0.

    `segments` is the largest even number up to the length, which no row exceeds in whole pairs.
    """
    segments = segment_ids.shape[1] // 2 * 2

    def of_row(values, ids):
        return jax.ops.segment_sum(values, ids, num_segments=segments + 1)

    return jax.vmap(of_row)(values.astype(jnp.float32), segment_ids)


def by_pair(values: jax.Array, batch: dict[str, jax.Array]) -> PairValues:
    """Sums of `values` over the segments of a batch, by pair.

    Args:
      values: [batch, length]; 0 where a position does not count.
      batch: with "loss_weights" and "segment_ids".
    """
    segment_ids = batch["segment_ids"]
    ends = response_ends(batch["loss_weights"], segment_ids)
    sums = sum_by_segment(values, segment_ids)
    answered = sum_by_segment(ends, segment_ids) > 0
    there = sum_by_segment(segment_ids > 0, segment_ids) > 0
    whole = answered[:, 1::2] & answered[:, 2::2]
    incomplete = (there[:, 1::2] | there[:, 2::2]) & ~whole
    return PairValues(jnp.where(whole, sums[:, 1::2], 0.0), jnp.where(whole, sums[:, 2::2], 0.0), whole, incomplete)


def pair_rewards(model: Model, params, batch: dict[str, jax.Array], rng: jax.Array | None = None) -> PairValues:
    """The rewards of all pairs of a batch.

    Args:
      model: with a scalar head (`ModelConfig.head`).
      batch: "tokens", "segment_ids" and "positions" int32 [batch, length]; "loss_weights" float32 [batch, length].
      rng: key for dropout, or None for a deterministic pass.
    """
    scalars = model.apply(
        {"params": params},
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
        method="scalars",
    )
    ends = response_ends(batch["loss_weights"], batch["segment_ids"])
    # `where`, not a product: the number at another position may be infinite.
    return by_pair(jnp.where(ends, scalars, 0.0), batch)


def preference_sums(margins: jax.Array, pairs: PairValues) -> dict[str, jax.Array]:
    """The sums that every objective on pairs reports.

    Args:
      margins: float32 [batch, pairs], the logit of the probability that the chosen side is the better one.

    Returns:
      Sums over the whole pairs: "weight" (their number), "correct", "margin", and "confidence", the probability of
      the side that the model prefers. Also "incomplete", the number of pairs that do not count.
    """
    whole = pairs.whole.astype(jnp.float32)
    return {
        "weight": whole.sum(),
        "correct": jnp.sum((margins > 0) * whole),
        "margin": jnp.sum(jnp.where(pairs.whole, margins, 0.0)),
        "confidence": jnp.sum(jnp.where(pairs.whole, jax.nn.sigmoid(jnp.abs(margins)), 0.0)),
        "incomplete": pairs.incomplete.astype(jnp.float32).sum(),
    }


def preference_metrics(sums: dict) -> dict:
    """The metrics of `preference_sums`, for arrays and for floats.

    Returns:
      "accuracy" (share of pairs whose chosen side has the larger number), mean "margin", mean "confidence", which for
      a calibrated model equals the accuracy, and the numbers of "pairs" and of "incomplete_pairs".
    """
    means = {name: sums[key] / sums["weight"] for name, key in _MEANS.items()}
    return {**means, "pairs": sums["weight"], "incomplete_pairs": sums["incomplete"]}


_MEANS = {"accuracy": "correct", "margin": "margin", "confidence": "confidence"}


def pairwise_loss(model: Model, params, batch: dict[str, jax.Array], rng: jax.Array | None):
    """-log sigmoid(reward of the chosen side - reward of the rejected side), summed over pairs (report 3.2.1).

    This is the logistic loss of Bradley-Terry, as in InstructGPT (arXiv 2203.02155). Arguments as in `pair_rewards`.

    Returns:
      (loss sum in nats, the sums of `preference_sums`, and "chosen" and "rejected", sums of the rewards).
    """
    pairs = pair_rewards(model, params, batch, rng)
    margins = pairs.chosen - pairs.rejected
    loss = jnp.sum(jnp.where(pairs.whole, jax.nn.softplus(-margins), 0.0))
    sums = preference_sums(margins, pairs)
    return loss, sums | {"chosen": pairs.chosen.sum(), "rejected": pairs.rejected.sum()}


def pairwise_preference() -> Objective:
    """The objective of preference model pretraining and of the reward model (report 3.2.1).

    The loss is the mean over pairs. A batch counts rows, which hold several pairs; the metric "pairs" is their number
    in an update.
    """
    return Objective(pairwise_loss, _reward_metrics, _held_out_metrics, _held_out_text)


def _reward_metrics(sums: dict) -> dict:
    rewards = {f"{side}_reward": sums[side] / sums["weight"] for side in ("chosen", "rejected")}
    return preference_metrics(sums) | rewards


def _held_out_metrics(sums: dict[str, float], examples) -> dict[str, float]:
    return {"loss": sums["loss"] / sums["weight"], **_reward_metrics(sums)}


def _held_out_text(metrics: dict[str, float]) -> str:
    return held_out_text(metrics, "reward")


def held_out_text(metrics: dict[str, float], name: str) -> str:
    """The line about held-out pairs; `name` says of what the margin is."""
    left_out = f", {metrics['incomplete_pairs']:.0f} without a response left out" * (metrics["incomplete_pairs"] > 0)
    return (
        f"held-out loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2%} of {metrics['pairs']:.0f} pairs at a "
        f"mean confidence of {metrics['confidence']:.2%}, mean {name} margin {metrics['margin']:.3f}{left_out}"
    )
