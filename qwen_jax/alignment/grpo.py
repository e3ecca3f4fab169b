"""GRPO (arXiv 2402.03300) on the rollouts of PPO, for rewards that a program computes or a model gives."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.advantages import group_advantages
from qwen_jax.alignment.experience import AGGREGATIONS
from qwen_jax.alignment.losses import policy_loss, policy_metrics, pretraining_loss
from qwen_jax.batch_spec import Column
from qwen_jax.training.objective import Objective
from qwen_jax.training.parameter_groups import check_numbers


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimization (arXiv 2402.03300): advantages among the responses to a prompt.

    There is no value model. The loss per token is trl's: the clipped surrogate plus `kl_coefficient` times k3 of policy
    and reference.

    Attributes:
      pretraining_coefficient, missing_end_penalty: as in `PPOConfig`; the penalty counts before the group's mean.
      kl_coefficient: of the KL in the loss. GRPO's paper has 0.04; 0 leaves the reference's term out.
      clip, clip_high: the ratio counts within [1 - clip, 1 + clip_high]; None for the latter: as `clip`.
      scale: whether advantages are divided by the group's standard deviation.
      aggregation: "sequence" (the paper), "token" (DAPO), "constant" (Dr. GRPO); see `token_weights`.
    """

    pretraining_coefficient: float
    missing_end_penalty: float
    kl_coefficient: float = 0.04
    clip: float = 0.2
    clip_high: float | None = None
    scale: bool = True
    aggregation: str = "sequence"

    has_value = False
    least_responses = 2

    def __post_init__(self):
        numbers = ("pretraining_coefficient", "missing_end_penalty", "kl_coefficient")
        positive = ("clip",) if self.clip_high is None else ("clip", "clip_high")
        check_numbers(self, positive=positive, not_negative=numbers)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"GRPOConfig.aggregation must be one of {', '.join(AGGREGATIONS)}, found {self.aggregation!r}"
            )

    def columns(self, length):
        names = ("weights", "behavior_log_probs", "advantages", "reference_log_probs")
        per_token = [Column(name, "float32", (length,), ("length",)) for name in names]
        return (Column("tokens", "int32", (length,), ("length",)), *per_token)

    def prepare(self, experience, extra):
        scores = jnp.asarray(experience.scores) - self.missing_end_penalty * (1 - jnp.asarray(experience.ended))
        advantages = np.asarray(group_advantages(scores, experience.group_size, self.scale))
        columns = {
            "tokens": experience.tokens,
            "behavior_log_probs": experience.behavior_log_probs,
            "advantages": (advantages[:, None] * experience.mask).astype(np.float32),
            "reference_log_probs": experience.reference_log_probs,
        }
        equal = np.ptp(np.asarray(scores).reshape(-1, experience.group_size), axis=1) == 0
        return columns, {"groups_without_signal": float(equal.mean())}

    def objective(self, temperature, top_p, pretraining_rows):
        high = self.clip if self.clip_high is None else self.clip_high

        def loss(model: ActorCritic, params, batch, rng):
            total, sums = policy_loss(
                model, params, batch, temperature, top_p, self.clip, high, reference_coefficient=self.kl_coefficient
            )
            if pretraining_rows and self.pretraining_coefficient:
                added, more = pretraining_loss(model, params, batch)
                total, sums = total + self.pretraining_coefficient * added, sums | more
            return total, sums

        return Objective(loss, policy_metrics)
