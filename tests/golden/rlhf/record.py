"""Runs trl's and verl's arithmetic of PPO and GRPO on random numbers; README.md says how."""

import inspect
import json
import textwrap
import types
from pathlib import Path

import torch
import trl
from trl.experimental.ppo import ppo_trainer
from trl.trainer import grpo_trainer

ROWS, LENGTH = 6, 10


def lines(function, first: str, last: str) -> str:
    """The source of a function from the line with `first` to before the line with `last`, without its indentation."""
    source = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(source) if first in line)
    stop = next(i for i, line in enumerate(source) if i > start and last in line)
    return textwrap.dedent("\n".join(source[start:stop]))


def inputs() -> dict[str, torch.Tensor]:
    """Random log-probabilities, values, scores and the lengths of responses, some of which fill their row."""
    torch.manual_seed(0)
    lengths = torch.tensor([4, 10, 7, 1, 9, 6])
    mask = (torch.arange(LENGTH) < lengths[:, None]).float()
    made = {name: torch.randn(ROWS, LENGTH) for name in ("log_probs", "reference", "values", "new", "new_values")}
    made = {name: 0.5 * x - (2 if name in ("log_probs", "reference", "new") else 0) for name, x in made.items()}
    made["new"] = made["log_probs"] + 0.3 * torch.randn(ROWS, LENGTH)
    made["new_values"] = made["values"] + 0.2 * torch.randn(ROWS, LENGTH)
    return made | {"mask": mask, "scores": torch.randn(ROWS), "group_advantages": torch.randn(ROWS)}


def of_trl(given: dict[str, torch.Tensor]) -> dict:
    """trl's rewards, advantages and losses of PPO, by its own lines."""
    sequence_lengths = given["mask"].sum(1).long() - 1
    place = torch.arange(LENGTH).repeat(ROWS, 1)
    padding_mask = place > sequence_lengths[:, None]
    padding_mask_p1 = place > sequence_lengths[:, None] + 1
    args = dict(kl_coef=0.05, gamma=1.0, lam=0.95, whiten_rewards=False, cliprange=0.2, cliprange_value=0.15)
    scope = vars(ppo_trainer) | {
        "responses": place,
        "logprobs": torch.masked_fill(given["log_probs"], padding_mask, ppo_trainer.INVALID_LOGPROB),
        "ref_logprobs": torch.masked_fill(given["reference"], padding_mask, ppo_trainer.INVALID_LOGPROB),
        "values": torch.masked_fill(given["values"], padding_mask_p1, 0),
        "scores": given["scores"],
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
        "sequence_lengths": sequence_lengths,
        "sequence_lengths_p1": sequence_lengths + 1,
    }
    kl = {}
    for estimator in ("k3", "k1"):
        scope["args"] = types.SimpleNamespace(kl_estimator=estimator, **args)
        exec(lines(ppo_trainer.PPOTrainer.train, "# 4. compute rewards", "empty_cache()"), scope)
        kl[estimator] = scope["kl"]
    scope |= {
        "micro_batch_inds": torch.arange(ROWS),
        "vpred": torch.masked_fill(given["new_values"], padding_mask_p1, 0),
        "new_logprobs": torch.masked_fill(given["new"], padding_mask, ppo_trainer.INVALID_LOGPROB),
        **{f"mb_{name}": scope[found] for name, found in (("values", "values"), ("return", "returns"))},
        "mb_advantage": scope["advantages"],
        "mb_logprobs": scope["logprobs"],
    }
    exec(lines(ppo_trainer.PPOTrainer.train, "vpredclipped = torch.clamp(", "loss = pg_loss +"), scope)
    return {
        "kl": kl,
        "rewards": scope["rewards"],
        "mask_p1": (~padding_mask_p1).float(),
        "returns": scope["returns"],
        "whitened": scope["advantages"],
        "policy_loss": scope["pg_loss"],
        "value_loss": scope["vf_loss"],
    }


def of_grpo(given: dict[str, torch.Tensor]) -> dict:
    """trl's losses of GRPO, by its own lines."""
    source = lines(grpo_trainer.GRPOTrainer._compute_loss, "log_ratio = per_token_logps", "# Entropy bonus: add")
    found = {}
    for loss_type in ("grpo", "bnpo", "dr_grpo"):
        trainer = types.SimpleNamespace(
            importance_sampling_level="token",
            beta=0.04,
            loss_type=loss_type,
            epsilon_low=0.2,
            epsilon_high=0.28,
            args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
            off_policy_mask_threshold=None,
            use_vllm=False,
            model=types.SimpleNamespace(training=False),
            max_completion_length=LENGTH,
        )
        scope = vars(grpo_trainer) | {
            "self": trainer,
            "per_token_logps": given["new"],
            "old_per_token_logps": given["log_probs"],
            "advantages": given["group_advantages"][:, None],
            "inputs": {"ref_per_token_logps": given["reference"]},
            "entropy_mask": None,
            "mask": given["mask"],
        }
        exec(source, scope)
        found[loss_type] = scope["loss"]
    return found


def of_verl(given: dict[str, torch.Tensor], rewards: torch.Tensor) -> dict:
    """verl's functions."""
    from verl.trainer.ppo import core_algos

    mask = given["mask"]
    advantages, returns = core_algos.compute_gae_advantage_return(rewards, given["values"] * mask, mask, 1.0, 0.95)
    policy = core_algos.compute_policy_loss(
        given["log_probs"], given["new"], advantages, mask, cliprange=0.2, clip_ratio_c=1e6
    )
    value = core_algos.compute_value_loss(given["new_values"], returns, given["values"], mask, 0.15)
    groups = [0, 0, 0, 1, 1, 1]
    grouped, _ = core_algos.compute_grpo_outcome_advantage(
        given["scores"][:, None] * (torch.arange(LENGTH) == 0), mask, torch.tensor(groups).numpy()
    )
    return {
        "kl": {
            name: core_algos.kl_penalty(given["log_probs"], given["reference"], name) for name in ("k1", "k2", "k3")
        },
        "returns": returns,
        "whitened": advantages * mask,
        "policy_loss": policy[0],
        "value_loss": value[0],
        "group_advantages": grouped[:, 0],
    }


def plain(value):
    """Tensors as lists."""
    return {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value.tolist()


def main() -> None:
    """Writes recorded.json beside this file."""
    given = inputs()
    found = of_trl(given)
    rewards = torch.randn(ROWS, LENGTH) * given["mask"]
    recorded = {
        "versions": {"trl": trl.__version__},
        "inputs": given | {"rewards": rewards},
        "trl": found,
        "grpo": of_grpo(given),
        "verl": of_verl(given, rewards),
    }
    text = json.dumps({name: plain(one) if name != "versions" else one for name, one in recorded.items()})
    Path(__file__).with_name("recorded.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
