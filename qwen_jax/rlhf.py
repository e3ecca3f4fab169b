"""Reinforcement learning from a reward: PPO with a pretraining gradient (report 3.2.2), and GRPO.

    python -m qwen_jax.rlhf --gin_file=gin/runs/ppo_tiny.gin --gin.OUTPUT_DIR=runs/ppo

On several hosts: the same command on each (`qwen_jax.distributed.hosts`).
"""

from qwen_jax.host_memory import keep_freed_memory, restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # here, because it begins again with the imports

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import gin
import jax
from jax.sharding import Mesh

from qwen_jax import files
from qwen_jax.alignment.actor_critic import ActorCritic, SeveralInitialWeights
from qwen_jax.alignment.experience import Algorithm
from qwen_jax.alignment.rewards import RewardFunction
from qwen_jax.alignment.rollouts import PRETRAINING, PROMPTS, RolloutConfig, Rollouts
from qwen_jax.checkpoints.run_folder import check_same_model, saved_steps
from qwen_jax.command_line import run
from qwen_jax.configuration import check_recipe, parse_args
from qwen_jax.conversion import load_tokenizer
from qwen_jax.conversion.initial_weights import InitialWeights
from qwen_jax.conversion.load import read_model_config
from qwen_jax.data.chatml import stop_ids
from qwen_jax.data.default_tokenizer import default_tokenizer
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.distributed import hosts
from qwen_jax.distributed.watchdog import Watchdog, join_job
from qwen_jax.files import PathLike
from qwen_jax.models.config import ModelConfig
from qwen_jax.reference_column import check_vocabulary
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.train import carry_out, check_length, check_state, find_cache, open_data, train
from qwen_jax.training.callbacks import Callback, Evaluation
from qwen_jax.training.goodput import process_start_time
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.run import Run, open_run
from qwen_jax.training.state import boxed_shapes
from qwen_jax.training.trainer import Trainer, standard_callbacks
from qwen_jax.training.trainer_config import TrainerConfig

HELD_OUT = "held-out text"
# Fields of the computation, which the value and the reward model take from the policy's configuration.
_COMPUTATION = ("dtype", "remat", "attention_kernel", "attention_blocks")


def rlhf(
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    algorithm: Algorithm,
    rollouts: RolloutConfig,
    prompts: str,
    output_dir: PathLike,
    cache_dir: PathLike,
    initial_checkpoint: PathLike,
    reward_checkpoint: PathLike | None = None,
    reward: RewardFunction | None = None,
    watched: Mapping[str, RewardFunction] | None = None,
    pretraining: str | None = None,
    mesh: MeshConfig = MeshConfig(),
    compiler_options: dict | None = None,
    compilation_cache: PathLike | None = "auto",
    watchdog: Watchdog | None = None,
    began: float | None = None,
) -> dict[str, float]:
    """Starts or continues the run in `output_dir`. Its checkpoints read as the policy elsewhere.

    Args:
      algorithm: a `PPOConfig` or a `GRPOConfig`.
      prompts: name of a SeqIO task or mixture of prompts, one in a row (packing "padded").
      initial_checkpoint: weights of the policy and the reference, in any format: an SFT model.
      reward_checkpoint: run folder or exported folder of the reward model, whose weights the value model begins with,
        too. Without one, the value model begins as the policy with a head of zeros.
      reward: computes rewards instead of a reward model.
      watched: rewards that are only logged, by name, such as the gold reward beside a reward model.
      pretraining: name of a task or mixture of text for the pretraining gradient and for the perplexity that shows the
        alignment tax; None: neither.
      mesh, optimizer, trainer, cache_dir, compiler_options, compilation_cache, watchdog, began: see `train`.

    Returns:
      The last metrics, with "step".

    Raises:
      ValueError, OSError: the run cannot start or go on; the message says what to change.
    """
    output, cache_dir = files.as_path(output_dir, "OUTPUT_DIR"), files.as_path(cache_dir, "CACHE_DIR")
    check_length(trainer, model)
    _check_pretraining(algorithm, pretraining)
    models = actor_critic(model, algorithm, reward_checkpoint)
    _check_reward_length(models, rollouts, reward_checkpoint)
    policy = files.as_path(initial_checkpoint, "INITIAL_CHECKPOINT")
    weights = _initial_weights(models, policy, reward_checkpoint)
    if not saved_steps(output):
        weights.check(nn.meta.unbox(boxed_shapes(models)))
        check_vocabulary(policy, default_tokenizer().fingerprint)
    devices = make_mesh(mesh)
    trainer = in_parts(trainer, algorithm, rollouts, devices)
    with open_run(output, lambda folder: check_same_model(folder, model), watchdog=watchdog, began=began) as run_folder:
        data = _load(prompts, pretraining, rollouts, run_folder, cache_dir, model)
        producer = _producer(models, algorithm, rollouts, trainer, devices, run_folder, data, reward, watched)
        check_state(models, optimizer, trainer, devices, producer.columns)
        training = Trainer(
            run_folder,
            models,
            algorithm.objective(rollouts.temperature, rollouts.top_p, rollouts.pretraining_rows),
            optimizer,
            trainer,
            devices,
            producer,
            [*_callbacks(run_folder, trainer, optimizer, data.get(HELD_OUT)), producer],
            initial_weights=weights,
            cache=find_cache(compilation_cache, run_folder.folder),
            compiler_options=compiler_options,
        )
        what = ", ".join(sorted(training.abstract.all_params))
        about = f"a rollout is {rollouts.rows} responses, then come {producer.steps} updates"
        return carry_out(training, model, what, about)


def _check_pretraining(algorithm: Algorithm, pretraining: str | None) -> None:
    if algorithm.pretraining_coefficient and pretraining is None:
        raise ValueError(
            f"PRETRAINING_COEFFICIENT is {algorithm.pretraining_coefficient} and there is no pretraining text: set "
            f"PRETRAINING to a task, or the coefficient to 0"
        )


def _check_reward_length(models: ActorCritic, rollouts: RolloutConfig, reward_checkpoint: PathLike | None) -> None:
    reward = models.reward_config
    if reward is not None and rollouts.length > reward.context_length:
        raise ValueError(
            f"SEQUENCE_LENGTH {rollouts.length} is more than the context_length {reward.context_length} of "
            f"REWARD_CHECKPOINT {reward_checkpoint}: lower it, or name a reward model of longer conversations"
        )


def _producer(
    models: ActorCritic,
    algorithm: Algorithm,
    rollouts: RolloutConfig,
    trainer: TrainerConfig,
    devices: Mesh,
    run_folder: Run,
    data: Mapping[str, ExampleLoader],
    reward: RewardFunction | None,
    watched: Mapping[str, RewardFunction] | None,
) -> Rollouts:
    """The rollouts of a run; arguments as in `rlhf`, with the data of `_load`.

    Raises:
      ValueError: the sizes do not divide, there is no reward, or are two.
    """
    tokenizer = default_tokenizer()
    producer = Rollouts(
        models,
        algorithm,
        rollouts,
        devices,
        run_folder.folder,
        prompts=data[PROMPTS],
        pretraining=data.get(PRETRAINING) if algorithm.pretraining_coefficient else None,
        batch_size=trainer.batch_size,
        rows_at_a_time=trainer.batch_size // trainer.accumulation(devices),
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer),
        reward=reward,
        watched=watched,
        skipped={stream: run_folder.skipped_examples(stream) for stream in data},
    )
    producer.check_intervals(trainer)
    return producer


def actor_critic(model: ModelConfig, algorithm: Algorithm, reward_checkpoint: PathLike | None) -> ActorCritic:
    """The models of a run, from their configurations.

    Raises:
      ValueError: the reward model has no scalar head, or another vocabulary.
    """
    if reward_checkpoint is None:
        reward_config, value_config = None, dataclasses.replace(model, head="scalar", tie_embeddings=False)
    else:
        computation = {field: getattr(model, field) for field in _COMPUTATION}
        reward_config = value_config = dataclasses.replace(read_model_config(reward_checkpoint), **computation)
        if reward_config.head != "scalar":
            raise ValueError(f"REWARD_CHECKPOINT {reward_checkpoint} has no scalar head: name a reward model")
        there, here = load_tokenizer(reward_checkpoint), default_tokenizer()
        if there.fingerprint != here.fingerprint:
            raise ValueError(
                f"REWARD_CHECKPOINT {reward_checkpoint} has another vocabulary than VOCABULARY ({here.path}): a reward "
                f"model must read the ids of the policy"
            )
    return ActorCritic(model, value_config if algorithm.has_value else None, reward_config)


def _initial_weights(models: ActorCritic, policy: PathLike, reward: PathLike | None) -> SeveralInitialWeights:
    parts = [InitialWeights(policy, {"policy": "", "reference": ""}, models.config)]
    if reward is not None:
        names = ("value", "reward") if models.value_config is not None else ("reward",)
        parts.append(InitialWeights(reward, dict.fromkeys(names, ""), models.reward_config))
    elif models.value_config is not None:
        names = ("token_embedding", "layers", "final_norm")
        parts.append(InitialWeights(policy, {f"value/{name}": name for name in names}))
    return SeveralInitialWeights(*parts)


def in_parts(trainer: TrainerConfig, algorithm: Algorithm, rollouts: RolloutConfig, devices: Mesh) -> TrainerConfig:
    """`trainer` with the number of parts of a minibatch: two models read a row, and one the pretraining text."""
    if trainer.sequence_length != rollouts.length:
        raise ValueError(
            f"TrainerConfig.sequence_length {trainer.sequence_length} must be RolloutConfig.length {rollouts.length}"
        )
    beside = rollouts.pretraining_rows if algorithm.pretraining_coefficient else 0
    tokens = rollouts.length * (1 + algorithm.has_value + beside)
    parts = dataclasses.replace(trainer, sequence_length=tokens).accumulation(devices)
    return dataclasses.replace(trainer, accumulation_steps=parts)


def _callbacks(
    run_folder: Run, trainer: TrainerConfig, optimizer: OptimizerConfig, held_out: ExampleLoader | None
) -> list[Callback]:
    """The usual callbacks; the evaluation is that of next-token prediction on pretraining text."""
    callbacks = standard_callbacks(run_folder, trainer, optimizer, None)
    if held_out is not None and trainer.eval_batches:
        # What alignment costs elsewhere.
        text = next_token_prediction()
        callbacks.insert(1, Evaluation(held_out, trainer.eval_every, trainer.eval_batches, text))
    return callbacks


def _load(
    prompts: str, pretraining: str | None, rollouts: RolloutConfig, run_folder: Run, cache_dir: Path, model: ModelConfig
) -> dict[str, ExampleLoader]:
    """The data streams by name, and `HELD_OUT` text; those that there are."""
    found = {}
    wanted = {PROMPTS: (prompts, rollouts.prompt_length, "padded")}
    if pretraining is not None:
        wanted[PRETRAINING] = (pretraining, rollouts.length, "concat")
    for stream, (task, length, packing) in wanted.items():
        where = {"cache_dir": cache_dir, "sequence_length": length, "packing": packing}
        found[stream], held_out = open_data(task, where, rollouts.seed, model, run_folder)
        if stream == PRETRAINING and held_out is not None:
            found[HELD_OUT] = held_out
    return found


def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.rlhf`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.rlhf",
        description="Trains a policy by reinforcement learning, or continues the run in OUTPUT_DIR.",
        epilog="example: python -m qwen_jax.rlhf --gin_file=gin/runs/ppo_tiny.gin --gin.OUTPUT_DIR=runs/ppo. The "
        "macros of a run are listed in gin/runs/rlhf.gin.",
    )
    hosts.add_arguments(parser)
    gin.configurable(train)  # gin/runs/train.gin configures it
    configured = gin.configurable(rlhf)
    args = parse_args(parser, argv)
    if not args.gin_file:
        parser.error("name at least one --gin_file; see the example in --help")
    check_recipe("rlhf", rlhf)
    keep_freed_memory()
    with join_job(hosts.job_config(args), gin.config_str()) as watchdog:
        result = configured(watchdog=watchdog, began=process_start_time())
    if jax.process_index() == 0:
        print(", ".join(f"{name} {value:.6g}" for name, value in result.items() if not name.startswith("hosts/")))


if __name__ == "__main__":
    run(main)
