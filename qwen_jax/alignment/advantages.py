"""Rewards and advantages of sampled responses: pure functions of arrays [rows, length], each aligned with its token.

Source: "The N Implementation Details of RLHF with PPO" (Hugging Face, 2023, on OpenAI's code of 2019), called N below.
Where it and the libraries differ, the docstring names the choice.
"""

import flax.struct
import jax
import jax.numpy as jnp

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(log_probs: jax.Array, reference: jax.Array, estimator: str = "k1") -> jax.Array:
    """KL divergence from the reference at a sampled token, estimated from its two log-probabilities, in nats.

    k1 is `log_probs - reference`: unbiased, and negative for some tokens; InstructGPT's, and in a reward the one whose
    gradient is that of the regularized objective (arXiv 2512.21852). k2 is half its square. k3 is `exp(-k1) - 1 + k1`:
    unbiased and never negative (tunix's default for PPO, and GRPO's, arXiv 2402.03300).

    Raises:
      ValueError: there is no such estimator.
    """
    difference = log_probs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"estimator of KL must be one of {', '.join(ESTIMATORS)}, found {estimator!r}")


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, kl_coefficient: float) -> jax.Array:
    """The reward of each token: minus the weighted KL, plus the score of the response at its last token (N).

    Args:
      scores: float32 [rows].
      kl: float32 [rows, length], as `kl_estimate` gives it.
      mask: [rows, length], 1 at the tokens of the response, its end token among them.

    Returns:
      float32 [rows, length]; 0 outside the response.
    """
    return -kl_coefficient * jnp.where(mask > 0, kl, 0.0) + scores[:, None] * is_last(mask)


def is_last(mask: jax.Array) -> jax.Array:
    """float32 [rows, length], 1 at the last token that `mask` [rows, length] has, else 0."""
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return ((mask > 0) & (after == 1)).astype(jnp.float32)


def generalized_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, discount: float = 1.0, decay: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (arXiv 1506.02438). The state after the last token has value 0.

    A token outside `mask` is passed over: the one before it sees the next one inside, as in verl and NeMo-RL.

    Args:
      rewards: float32 [rows, length], of each token.
      values: float32 [rows, length], of the state in which each token was chosen.
      mask: [rows, length], 1 at the tokens of the response.
      discount: gamma; 1 in N.
      decay: lambda; 0.95 in N.

    Returns:
      (advantages, returns), both float32 [rows, length], 0 outside the mask. Returns are advantages plus values.
    """

    def step(carry, xs):
        next_value, next_advantage = carry
        reward, value, inside = xs
        advantage = reward + discount * next_value - value + discount * decay * next_advantage
        carry = (jnp.where(inside, value, next_value), jnp.where(inside, advantage, next_advantage))
        return carry, jnp.where(inside, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    xs = (rewards.T, values.T, mask.T > 0)
    _, advantages = jax.lax.scan(step, (zeros, zeros), xs, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(mask > 0, advantages + values, 0.0)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` where `mask` is 1."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """`x` with variance 1 over the mask, and mean 0 or its own.

    The variance is Bessel's (n - 1), as in trl, verl and tunix; OpenAI's code has n. N whitens advantages with the mean
    shifted, over the whole batch of rollouts.

    Args:
      x, mask: [rows, length].
      shift_mean: False keeps the mean (N's rewards).

    Returns:
      [rows, length], 0 outside the mask.
    """
    mean = masked_mean(x, mask)
    count = jnp.sum(mask)
    variance = masked_mean((x - mean) ** 2, mask) * count / jnp.maximum(count - 1.0, 1.0)
    whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0.0)


def group_advantages(scores: jax.Array, group_size: int, scale: bool = True) -> jax.Array:
    """Advantages of the responses to one prompt against each other (GRPO, arXiv 2402.03300).

    Args:
      scores: float32 [groups * group_size], the responses to one prompt side by side.
      scale: whether to divide by the group's standard deviation (of n - 1, plus 1e-4, as trl does); False is Dr. GRPO
        (arXiv 2503.20783).

    Returns:
      float32 [groups * group_size].
    """
    groups = scores.reshape(-1, group_size)
    centered = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        centered = centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return centered.reshape(-1)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect value model, 0 for a constant one."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1.0 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)


@flax.struct.dataclass
class RunningMean:
    """Mean and variance of all numbers so far, merged batch by batch (Chan et al. 1979).

    Attributes:
      count: float32, how many.
      mean: float32.
      squares: float32, sum of squared differences from the mean.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @classmethod
    def empty(cls) -> "RunningMean":
        """Of no number."""
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def add(self, x: jax.Array, mask: jax.Array) -> "RunningMean":
        """With those of `x` [n] where `mask` [n] is 1."""
        count = jnp.sum(mask)
        mean = jnp.sum(x * mask) / jnp.maximum(count, 1.0)
        return self.merge(RunningMean(count, mean, jnp.sum(mask * (x - mean) ** 2)))

    def merge(self, other: "RunningMean") -> "RunningMean":
        """With all numbers of both."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1.0)
        difference = other.mean - self.mean
        squares = self.squares + other.squares + difference**2 * self.count * share
        return RunningMean(count, self.mean + difference * share, squares)

    def normalize(self, x: jax.Array, scale: bool = False) -> jax.Array:
        """`x` less the running mean (report 3.2.2); with `scale`, over the running standard deviation (n - 1), too."""
        centered = x - self.mean
        if not scale:
            return centered
        variance = self.squares / jnp.maximum(self.count - 1.0, 1.0)
        return centered * jax.lax.rsqrt(variance + 1e-8)
