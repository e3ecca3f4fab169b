"""Prompts made by arithmetic, a tokenizer of letters, and trainers of tiny policies on them."""

from pathlib import Path

import jax
import numpy as np

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.ppo import PPOConfig
from qwen_jax.alignment.rollouts import RolloutConfig, Rollouts
from qwen_jax.batch_spec import token_columns
from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.goodput import Goodput
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.parameter_groups import ParameterGroup, ScheduleConfig
from qwen_jax.training.run import Run
from qwen_jax.training.trainer import Trainer, standard_callbacks
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, random_params, small_model

# Ids of the end tokens, and the number of letters below them.
IM_END, ENDOFTEXT, LETTERS = 61, 62, 60


class FakePrompts:
    """Prompts of 2 to `length` - 2 letters, a function of the index, with a reference answer of two letters."""

    repeat, bytes_per_token = True, 1.0

    def __init__(self, length=8, answers=True):
        self.length, self.answers, self.fingerprint = length, answers, f"prompts-{length}"
        self.columns = token_columns(length, packed=True)

    def __len__(self):
        return 1000

    def read(self, start, stop):
        found = {column.name: np.zeros((stop - start, self.length), column.dtype) for column in self.columns}
        for row, index in enumerate(range(start, stop)):
            size = 2 + index % (self.length - 3)
            found["tokens"][row, :size] = (index * 7 + np.arange(size) * 3) % LETTERS
            found["segment_ids"][row, :size], found["loss_weights"][row, :size] = 1, 1
            found["positions"][row, :size] = np.arange(size)
            if self.answers and size + 2 <= self.length:
                found["tokens"][row, size : size + 2] = index % LETTERS
                found["segment_ids"][row, size : size + 2] = 2
        return found


class Letters:
    """A tokenizer: id i is the i-th character from "0" on."""

    vocab_size = 64

    def decode_bytes(self, ids):
        return "".join(chr(ord("0") + token) for token in ids).encode()


def share_of_sevens(prompt, response, answer):
    """A reward: the share of the letter 7 in a response."""
    return response.count("7") / max(len(response), 1)


def optimizer(rate=1e-3, value_rate=1e-3, start_step=0, value=True):
    """Groups as gin/runs/ppo.gin has them."""
    constant = dict(schedule="constant")
    groups = [ParameterGroup("policy", "policy/.*", ScheduleConfig(rate, **constant), start_step=start_step)]
    groups += [ParameterGroup("value", "value/.*", ScheduleConfig(value_rate, **constant))] if value else []
    groups += [ParameterGroup("frozen", "(reference|reward)/.*", None)]
    return OptimizerConfig(rate, schedule="constant", weight_decay=0.0, groups=tuple(groups))


def rollout_trainer(
    folder,
    *,
    algorithm=None,
    rollouts=None,
    reward=share_of_sevens,
    reward_model=False,
    steps=8,
    batch_size=4,
    checkpoint_every=4,
    groups=None,
    mesh=None,
    pretraining=True,
    callbacks=(),
    model=None,
    log_every=1,
    **options,
):
    """A Trainer with its Rollouts (`trainer.batches`): rows of 8 + 8 tokens, two prompts x two responses, 2 epochs."""
    algorithm = algorithm or PPOConfig(pretraining_coefficient=0.5, missing_end_penalty=1.0)
    rollouts = rollouts or RolloutConfig(16, 8, 4, epochs=2, pretraining_rows=2, slots=8)
    config = model or small_model(num_layers=1)
    scalar = small_model(num_layers=1, head="scalar")
    models = ActorCritic(config, scalar if algorithm.has_value else None, scalar if reward_model else None)
    mesh = mesh or make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    trainer_config = TrainerConfig(
        steps, batch_size, rollouts.length, checkpoint_every=checkpoint_every, log_every=log_every, eval_batches=0
    )
    Path(folder).mkdir(exist_ok=True)
    run = Run(Path(folder), Activity(), Goodput(folder))
    text = FakeExamples(length=rollouts.length) if pretraining and algorithm.pretraining_coefficient else None
    producer = Rollouts(
        models,
        algorithm,
        rollouts,
        mesh,
        Path(folder),
        prompts=FakePrompts(rollouts.prompt_length),
        pretraining=text,
        batch_size=batch_size,
        rows_at_a_time=batch_size,
        tokenizer=Letters(),
        stop_ids=(IM_END, ENDOFTEXT),
        reward=None if reward_model else reward,
        **options,
    )
    groups = groups or optimizer(value=algorithm.has_value)
    return Trainer(
        run,
        models,
        algorithm.objective(rollouts.temperature, rollouts.top_p, rollouts.pretraining_rows),
        groups,
        trainer_config,
        mesh,
        producer,
        [*standard_callbacks(run, trainer_config, groups, None), *callbacks, producer],
    )


def checkpoint(folder, name, config, ranks=range(256), seed=0):
    """A run folder with random weights over the vocabulary of single bytes."""
    vocabulary = folder / f"{name}.tiktoken"
    write_ranks({bytes([byte]): rank for byte, rank in zip(range(256), ranks, strict=True)}, vocabulary)
    save_params(folder / name, config, random_params(config, 0.02, seed), vocabulary)
    return folder / name
