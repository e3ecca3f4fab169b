"""PPO with a pretraining gradient (report 3.2.2).

Choices that implementations differ in, beside those of losses.py: KL in the reward by k1 (InstructGPT); advantages
whitened over all tokens of a rollout with Bessel's n - 1 (trl, verl), rewards not whitened; the value of the state
after the last token is 0, also where a response ran out of length (trl); losses are means over the tokens of a
minibatch, by counts over all devices and parts; Adam's epsilon is `OptimizerConfig.epsilon`, added after bias
correction as in PyTorch (OpenAI's code adds it before).
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.advantages import (
    ESTIMATORS,
    RunningMean,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)
from qwen_jax.alignment.experience import Experience
from qwen_jax.alignment.losses import clipped_value_loss, policy_loss, policy_metrics, pretraining_loss
from qwen_jax.batch_spec import Column
from qwen_jax.training.objective import Objective
from qwen_jax.training.parameter_groups import check_numbers


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO as in report 3.2.2; the report gives `kl_coefficient` and `value_clip`.

    Attributes:
      pretraining_coefficient: weight of the mean loss of pretraining text in nats per token, beside the policy loss.
        The report gives no number, only that too large a one keeps the policy from its reward and too small a one does
        nothing; InstructGPT's is 27.8 beside a KL coefficient of 0.02. 0 leaves pretraining out.
      missing_end_penalty: subtracted from the normalized reward of a response without end token, which else is paid for
        what it has not finished (N and trl; the report says nothing).
      kl_coefficient: of the KL in the reward.
      kl_estimator: "k1", "k2" or "k3"; see `kl_estimate`.
      reward_scale: whether to divide rewards by their running standard deviation as well; the report has their running
        mean alone.
      discount, decay: gamma and lambda of the advantages (N).
      clip: of the ratio (PPO's paper).
      value_clip: how far a value may move from the rollout's.
      value_coefficient: weight of the value loss (N+, trl). Adam cancels it, but the clipping of the gradient's norm,
        which counts both models, does not.
    """

    pretraining_coefficient: float
    missing_end_penalty: float
    kl_coefficient: float = 0.04
    kl_estimator: str = "k1"
    reward_scale: bool = False
    discount: float = 1.0
    decay: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.15
    value_coefficient: float = 0.1

    aggregation = "token"
    least_responses = 1
    has_value = True

    def __post_init__(self):
        check_numbers(
            self,
            positive=("clip", "value_clip", "value_coefficient", "discount", "decay"),
            not_negative=("pretraining_coefficient", "missing_end_penalty", "kl_coefficient"),
        )
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(
                f"PPOConfig.kl_estimator must be one of {', '.join(ESTIMATORS)}, found {self.kl_estimator!r}"
            )

    def columns(self, length):
        names = ("weights", "behavior_log_probs", "advantages", "returns", "values")
        per_token = [Column(name, "float32", (length,), ("length",)) for name in names]
        return (
            Column("tokens", "int32", (length,), ("length",)),
            *per_token,
            Column("scores", "float32", (), ()),
            Column("first_epoch", "float32", (), ()),
        )

    def prepare(self, experience, extra):
        arrays, metrics = jax.device_get(_ppo_columns(self, _arrays(experience), extra))
        columns = {
            "tokens": experience.tokens,
            "behavior_log_probs": experience.behavior_log_probs,
            "values": experience.values,
            "scores": experience.scores,
            **arrays,
        }
        return columns, {name: float(value) for name, value in metrics.items()}

    def objective(self, temperature, top_p, pretraining_rows):
        def loss(model: ActorCritic, params, batch, rng, extra):
            weights = batch["weights"]
            total, sums = policy_loss(model, params, batch, temperature, top_p, self.clip, self.clip)
            values = model.values(params["value"], batch["tokens"])
            value_loss, clipped = clipped_value_loss(values, batch["values"], batch["returns"], self.value_clip)
            sums |= {"value_loss": jnp.sum(weights * value_loss), "value_clipped": jnp.sum(weights * clipped)}
            total = total + self.value_coefficient * sums["value_loss"]
            if pretraining_rows and self.pretraining_coefficient:
                added, more = pretraining_loss(model, params, batch)
                total, sums = total + self.pretraining_coefficient * added, sums | more
            return total, sums | _score_sums(batch, extra)

        def summarize(sums):
            found = policy_metrics(sums)
            for name in ("value_loss", "value_clipped"):
                found[name] = sums[name] / sums["token_weight"]
            return found

        return Objective(loss, summarize, initial_extra=_no_scores, update_extra=_add_scores)


def _no_scores() -> dict[str, jax.Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("count", "mean", "squares")}


def _score_sums(batch, extra) -> dict[str, jax.Array]:
    """Sums of the scores that this minibatch is the first to see; around the mean so far, to keep their digits."""
    fresh, scores = batch["first_epoch"], batch["scores"] - extra["mean"]
    return {
        "score_count": jnp.sum(fresh),
        "score_sum": jnp.sum(fresh * scores),
        "score_squares": jnp.sum(fresh * scores**2),
    }


def _add_scores(extra, sums):
    count = jnp.maximum(sums["score_count"], 1.0)
    shift = sums["score_sum"] / count
    new = RunningMean(sums["score_count"], extra["mean"] + shift, sums["score_squares"] - shift**2 * count)
    merged = RunningMean(**extra).merge(new)
    # With no new score, nothing changes by rounding either.
    return {name: jnp.where(sums["score_count"] > 0, getattr(merged, name), extra[name]) for name in extra}


@jax.jit(static_argnums=0)
def _ppo_columns(config: PPOConfig, experience: dict[str, jax.Array], extra: dict[str, jax.Array]):
    """(columns advantages and returns, metrics) of rollouts."""
    mask, scores, ended = experience["mask"], experience["scores"], experience["ended"]
    running = RunningMean(**extra).add(scores, jnp.ones_like(scores))
    normalized = running.normalize(scores, config.reward_scale) - config.missing_end_penalty * (1 - ended)
    kl = kl_estimate(experience["log_probs"], experience["reference_log_probs"], config.kl_estimator)
    rewards = token_rewards(normalized, kl, mask, config.kl_coefficient)
    values = experience["values"] * mask
    advantages, returns = generalized_advantages(rewards, values, mask, config.discount, config.decay)
    metrics = {
        "reward_normalized": jnp.mean(normalized),
        "reward_running_mean": running.mean,
        "reward_with_kl": jnp.mean(jnp.sum(rewards, axis=1)),
        "value_mean": masked_mean(values, mask),
        "explained_variance": explained_variance(values, returns, mask),
    }
    return {"advantages": whiten(advantages, mask), "returns": returns}, metrics


def _arrays(experience: Experience) -> dict:
    names = ("mask", "log_probs", "reference_log_probs", "values", "scores", "ended")
    return {name: getattr(experience, name) for name in names}
