"""Figures of a rollout for the metrics of a run, and responses to look at."""

import json

import numpy as np

from qwen_jax.alignment.experience import Experience

# Responses of a rollout that are written down.
SAMPLES = 8


def rollout_metrics(
    experience: Experience,
    judged: dict[str, np.ndarray],
    watched: dict[str, np.ndarray],
    seconds: dict[str, float],
) -> dict[str, float]:
    """Figures of a rollout.

    Args:
      judged: as `Scorer` gives it.
      watched: rewards [rows] that are only logged, by name.
      seconds: by part of the work.

    Returns:
      `rollout/NAME`: "reward" and "reward_std" of the rewards as they came; "kl" in nats of a whole response, by k1,
      and "kl_per_token"; "entropy"; "response_length" in tokens; "without_end", the share of responses without one;
      "mismatch", mean exp|difference| between the log-probabilities of the engine and of the trainer (1 is agreement;
      above 1.05 investigate, as NeMo-RL says); "outside_nucleus", the share of tokens that are outside the nucleus as
      the trainer computes it; `watched/NAME`; `seconds/NAME`.
    """
    mask = experience.mask > 0
    tokens = mask.sum()
    kl = np.where(mask, experience.log_probs - experience.reference_log_probs, 0.0)
    inside = mask & np.isfinite(judged["nucleus_log_probs"])
    difference = np.abs(experience.behavior_log_probs[inside] - judged["nucleus_log_probs"][inside])
    found = {
        "reward": experience.scores.mean(),
        "reward_std": experience.scores.std(),
        "kl": kl.sum(axis=1).mean(),
        "kl_per_token": kl.sum() / tokens,
        "entropy": judged["entropy"][mask].mean(),
        "response_length": mask.sum(axis=1).mean(),
        "without_end": 1 - experience.ended.mean(),
        "mismatch": np.exp(difference).mean() if len(difference) else 1.0,
        "outside_nucleus": 1 - inside.sum() / tokens,
        **{f"watched/{name}": values.mean() for name, values in watched.items()},
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }
    return {f"rollout/{name}": float(value) for name, value in found.items()}


def sample_lines(texts: list[tuple[str, str, str | None]], scores: np.ndarray) -> str:
    """JSON lines of the first responses: prompt, response, answer if there is one, and reward."""
    lines = []
    for (prompt, response, answer), score in list(zip(texts, scores.tolist(), strict=True))[:SAMPLES]:
        shown = {"prompt": prompt, "response": response, "answer": answer, "reward": score}
        lines.append(json.dumps({k: v for k, v in shown.items() if v is not None}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
