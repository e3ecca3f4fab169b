"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), on the rows of pairs of `preferences.py`.

The reference model is not in memory while the policy trains: its log-probabilities are a column of the batch,
"reference_log_probs", which `qwen_jax.reference_column` computes once and keeps beside the packed data.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.alignment.preferences import by_pair, held_out_text, preference_metrics, preference_sums, sum_by_segment
from qwen_jax.batch_spec import Column
from qwen_jax.models.log_probs import token_log_probs
from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective

REFERENCE_COLUMN = "reference_log_probs"


def reference_column(length: int) -> Column:
    """The column of the log-probabilities under the reference, for rows of `length` tokens."""
    return Column(REFERENCE_COLUMN, "float32", (length,), ("length",))


def response_log_probs(model: Model, params, batch: dict[str, jax.Array], rng: jax.Array | None = None) -> jax.Array:
    """Log-probability of each token of the responses, given those before it in its segment: float32 [batch, length].

    0 at tokens without weight and at the first token of a segment.

    Args:
      model: with a token head.
      batch: "tokens", "segment_ids" and "positions" int32 [batch, length]; "loss_weights" float32 [batch, length].
      rng: key for dropout, or None for a deterministic pass.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden = model.apply(
        {"params": params},
        tokens,
        positions=batch["positions"],
        segment_ids=segment_ids,
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
        method="hidden_states",
    )
    kernel = model.apply({"params": params}, method="output_kernel")
    # Position t predicts token t + 1; the result stands at the token itself.
    log_probs = jnp.roll(token_log_probs(hidden, kernel, jnp.roll(tokens, -1, axis=1)), 1, axis=1)
    known = (segment_ids == jnp.roll(segment_ids, 1, axis=1)).at[:, 0].set(False)
    return jnp.where(known & (segment_ids > 0) & (batch["loss_weights"] > 0), log_probs, 0.0)


def direct_preference_loss(
    model: Model,
    params,
    batch: dict[str, jax.Array],
    rng: jax.Array | None,
    *,
    beta: float,
    label_smoothing: float,
    sft_weight: float,
):
    """The loss of `direct_preference`, summed over pairs; the batch has the column REFERENCE_COLUMN, too.

    Returns:
      (loss sum in nats, the sums of `preference_sums` with margins of implicit rewards, and "chosen" and "rejected",
      sums of the implicit rewards, "chosen_log_prob" and "rejected_log_prob", sums over the tokens of the responses).

    Raises:
      ValueError: the batch lacks the column.
    """
    if REFERENCE_COLUMN not in batch:
        raise ValueError(
            f"direct_preference needs the column {REFERENCE_COLUMN!r}: bind train.reference = @ReferenceModel(), as "
            f"gin/runs/dpo.gin does"
        )
    log_probs = response_log_probs(model, params, batch, rng)
    rewards = by_pair(beta * (log_probs - batch[REFERENCE_COLUMN]), batch)
    margins = rewards.chosen - rewards.rejected
    right, wrong = jax.nn.softplus(-margins), jax.nn.softplus(margins)
    of_pair = (1 - label_smoothing) * right + label_smoothing * wrong
    policy = by_pair(log_probs, batch)
    if sft_weight:
        lengths = sum_by_segment(batch["loss_weights"] > 0, batch["segment_ids"])[:, 1::2]
        of_pair = of_pair - sft_weight * policy.chosen / jnp.maximum(lengths, 1.0)
    loss = jnp.sum(jnp.where(rewards.whole, of_pair, 0.0))
    sums = preference_sums(margins, rewards) | {
        "chosen": rewards.chosen.sum(),
        "rejected": rewards.rejected.sum(),
        "chosen_log_prob": policy.chosen.sum(),
        "rejected_log_prob": policy.rejected.sum(),
    }
    return loss, sums


def direct_preference(beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0) -> Objective:
    """The objective of DPO: -log sigmoid of the margin of implicit rewards, a mean over pairs.

    The implicit reward of a response is beta * (log-probability under the policy - that under the reference).

    Args:
      beta: how close the policy stays to the reference; 0.1 in the paper's dialogue experiments.
      label_smoothing: the assumed share of pairs whose labels are swapped (conservative DPO,
        https://ericmitchell.ai/cdpo.pdf), in [0, 0.5).
      sft_weight: weight of a further term, the mean negative log-probability of a token of the chosen response (Pang
        et al. 2024, arXiv 2404.19733); 0 leaves it out.

    Raises:
      ValueError: a value is out of range.
    """
    if not beta > 0 or not 0 <= label_smoothing < 0.5 or not sft_weight >= 0:
        raise ValueError(
            f"direct_preference needs beta > 0, 0 <= label_smoothing < 0.5 and sft_weight >= 0, found beta={beta}, "
            f"label_smoothing={label_smoothing}, sft_weight={sft_weight}"
        )
    loss = functools.partial(direct_preference_loss, beta=beta, label_smoothing=label_smoothing, sft_weight=sft_weight)
    return Objective(loss, _metrics, _held_out_metrics, lambda metrics: held_out_text(metrics, "implicit reward"))


def _metrics(sums: dict) -> dict:
    names = {
        "chosen_reward": "chosen",
        "rejected_reward": "rejected",
        "chosen_log_prob": "chosen_log_prob",
        "rejected_log_prob": "rejected_log_prob",
    }
    return preference_metrics(sums) | {name: sums[key] / sums["weight"] for name, key in names.items()}


def _held_out_metrics(sums: dict[str, float], examples) -> dict[str, float]:
    return {"loss": sums["loss"] / sums["weight"], **_metrics(sums)}
