"""Losses that PPO and GRPO share, as sums over the tokens of a minibatch or of a part of it.

Every policy log-probability is at the temperature of sampling. The ratio is between log-probabilities *in the nucleus*
(top-p) on both sides: those that the engine drew by, and the current policy's in its own nucleus, as NeMo-RL does. A
token that has left the current nucleus has no probability there; it gets no loss and is counted (`outside_nucleus`), as
NeMo-RL masks it. KL, entropy and the reference are of the whole vocabulary, so that sampling with top-p makes no KL
negative.
"""

import jax
import jax.numpy as jnp

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.advantages import kl_estimate
from qwen_jax.training.objectives import next_token_loss

# A log-ratio beyond this is cut, as verl does: its exponential would be infinite.
_LARGEST_LOG_RATIO = 20.0


def clipped_policy_loss(log_ratio, advantages, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate (arXiv 1707.06347), negated, and where the clipping acts.

    Args:
      log_ratio: log-probability now less that at sampling.
      advantages: of the same shape.
      low, high: the ratio counts within [1 - low, 1 + high].
    """
    ratio = jnp.exp(log_ratio)
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high)
    return jnp.maximum(plain, clipped), clipped > plain


def clipped_value_loss(values, rollout_values, returns, clip: float) -> tuple[jax.Array, jax.Array]:
    """Half the larger of two squared errors: of the value, and of the value kept within `clip` of the rollout's (N)."""
    kept = rollout_values + jnp.clip(values - rollout_values, -clip, clip)
    plain, clipped = (values - returns) ** 2, (kept - returns) ** 2
    return 0.5 * jnp.maximum(plain, clipped), clipped > plain


def policy_loss(model: ActorCritic, params, batch, temperature, top_p, low, high, reference_coefficient=0.0):
    """(sum over the tokens of a minibatch, or of a part of it; sums for `policy_metrics`)."""
    weights = batch["weights"]
    found = model.token_statistics(
        params["policy"], batch["tokens"], temperature=temperature, top_p=top_p, with_entropy=True
    )
    assert found.entropy is not None and found.nucleus_log_probs is not None  # both were requested
    inside = jnp.isfinite(found.nucleus_log_probs) & (weights > 0)
    # Nothing infinite may reach the exponential, or the gradient would be NaN.
    log_ratio = jnp.where(inside, found.nucleus_log_probs, 0.0) - jnp.where(inside, batch["behavior_log_probs"], 0.0)
    log_ratio = jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    surrogate, clipped = clipped_policy_loss(log_ratio, batch["advantages"], low, high)
    counted = weights * inside
    sums = {
        "weight": jnp.float32(len(weights)),
        "token_weight": jnp.sum(weights),
        "policy_loss": jnp.sum(counted * surrogate),
        "policy_clipped": jnp.sum(counted * clipped),
        # Between the sampling and the current policy: k3, which is not negative.
        "policy_kl": jnp.sum(counted * (jnp.exp(log_ratio) - 1 - log_ratio)),
        "outside_nucleus": jnp.sum(weights * ~inside),
        "entropy": jnp.sum(weights * found.entropy),
    }
    total = sums["policy_loss"]
    if reference_coefficient:
        # 0 outside the response before the exponential, as above: prompt and filling may lie far from the reference.
        reference = jnp.where(weights > 0, batch["reference_log_probs"], found.log_probs)
        sums["reference_kl"] = jnp.sum(weights * kl_estimate(found.log_probs, reference, "k3"))
        total = total + reference_coefficient * sums["reference_kl"]
    return total, sums


def pretraining_loss(model: ActorCritic, params, batch):
    """(Mean loss in nats per position of the pretraining rows, summed over the rows beside them; sums for metrics)."""
    tokens = batch["pretraining_tokens"]
    rows, beside, length = tokens.shape
    flat = {
        name: batch[f"pretraining_{name}"].reshape(rows * beside, length)
        for name in ("tokens", "loss_weights", "segment_ids", "positions")
        if f"pretraining_{name}" in batch
    }
    loss, sums = next_token_loss(model, params, flat, None)
    more = {"pretraining_loss": loss, "pretraining_tokens": sums["weight"]}
    return loss / (beside * (length - 1)), more


def policy_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a step from the sums of `policy_loss` and `pretraining_loss`: means over weighted tokens."""
    names = ("policy_loss", "policy_clipped", "policy_kl", "outside_nucleus", "entropy", "reference_kl")
    found = {name: sums[name] / sums["token_weight"] for name in names if name in sums}
    if "pretraining_loss" in sums:
        found["pretraining_loss"] = sums["pretraining_loss"] / jnp.maximum(sums["pretraining_tokens"], 1.0)
    return found
