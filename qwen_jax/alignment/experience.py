"""Rollouts with what the models say of them, and the interface of the algorithms that learn from them."""

import dataclasses
from typing import Protocol

import numpy as np

from qwen_jax.batch_spec import Column
from qwen_jax.training.objective import Objective

AGGREGATIONS = ("token", "sequence", "constant")


@dataclasses.dataclass(frozen=True)
class Experience:
    """Rollouts with what the models say of them; arrays [rows, length] are aligned with the token.

    The responses to one prompt are side by side.

    Attributes:
      tokens: int32, prompt, response and filling.
      mask: float32, 1 at the tokens of the response, its end token among them.
      behavior_log_probs: float32, of the distribution that the engine drew from.
      log_probs: float32, the policy's over the whole vocabulary, at the temperature.
      reference_log_probs: float32, the reference's, likewise.
      values: float32, of the value model; None without one.
      scores: float32 [rows], the rewards as they came.
      ended: float32 [rows], 1 where the response has its end token.
      group_size: responses to each prompt.
    """

    tokens: np.ndarray
    mask: np.ndarray
    behavior_log_probs: np.ndarray
    log_probs: np.ndarray
    reference_log_probs: np.ndarray
    values: np.ndarray | None
    scores: np.ndarray
    ended: np.ndarray
    group_size: int


class Algorithm(Protocol):
    """What a rollout producer and the trainer need of PPO or GRPO; `PPOConfig` and `GRPOConfig` are the two."""

    pretraining_coefficient: float
    aggregation: str
    # Responses to a prompt, at least.
    least_responses: int

    @property
    def has_value(self) -> bool:
        """Whether there is a value model."""
        ...

    def columns(self, length: int) -> tuple[Column, ...]:
        """The columns of a minibatch that `prepare` gives."""
        ...

    def prepare(self, experience: Experience, extra: dict) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """(values of these columns for all rows, metrics of the rollout); `extra` is that of the train state."""
        ...

    def objective(self, temperature: float, top_p: float, pretraining_rows: int) -> Objective:
        """The objective of a minibatch.

        Args:
          temperature, top_p: of sampling.
          pretraining_rows: rows of pretraining text beside each row.
        """
        ...


def token_weights(mask: np.ndarray, aggregation: str, response_length: int) -> np.ndarray:
    """The weight of each response token in the loss of one minibatch, float32 [rows, length].

    The loss is the weighted sum over tokens, divided by the number of rows.

    Args:
      mask: [rows, length] of the whole minibatch, over all devices.
      aggregation: "token" is the mean over all tokens (PPO; bnpo and dapo of trl), "sequence" the mean of the means of
        responses (GRPO's paper), "constant" the sum over `response_length` (Dr. GRPO).
      response_length: the largest number of tokens of a response.
    """
    mask = np.asarray(mask, np.float32)
    if aggregation == "sequence":
        return mask / np.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    if aggregation == "constant":
        return mask / np.float32(response_length)
    return mask * np.float32(len(mask) / max(mask.sum(), 1.0))
