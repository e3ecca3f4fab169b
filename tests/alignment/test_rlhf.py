"""The entry point of reinforcement learning: the report's numbers, and models and weights that fit together."""

import re

import flax.linen as nn
import gin
import jax
import numpy as np
import pytest

import qwen_jax.rlhf
import qwen_jax.train
from qwen_jax.alignment.grpo import GRPOConfig
from qwen_jax.alignment.ppo import PPOConfig
from qwen_jax.alignment.rollouts import RolloutConfig
from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.checkpoints.run_folder import write_run_files
from qwen_jax.configuration import ConfigurationError, load_gin
from qwen_jax.conversion import load_pretrained
from qwen_jax.conversion.load import open_weights
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.rlhf import actor_critic
from qwen_jax.training.parameter_groups import assign_groups
from qwen_jax.training.trainer_config import TrainerConfig
from tests.alignment.fakes import checkpoint, optimizer, rollout_trainer
from tests.fakes import small_model

gin.configurable(qwen_jax.train.train)
gin.configurable(qwen_jax.rlhf.rlhf)
BINDINGS = ["OUTPUT_DIR=x", "INITIAL_CHECKPOINT=sft", "MIXTURE_OR_TASK=queries"]


@pytest.fixture(autouse=True)
def no_configuration_of_another_test():
    yield
    gin.clear_config()


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_the_recipe_has_the_numbers_of_the_report(size):
    load_gin([f"gin/runs/ppo_{size}.gin"], [*BINDINGS, "PRETRAINING=text", "PRETRAINING_COEFFICIENT=1.0"])
    algorithm, rollouts = gin.get_configurable("PPOConfig")(), gin.get_configurable("RolloutConfig")()
    assert (algorithm.kl_coefficient, algorithm.value_clip, algorithm.kl_estimator) == (0.04, 0.15, "k1")
    assert (rollouts.responses_per_prompt, rollouts.top_p) == (2, 0.9) and rollouts.pretraining_rows > 1
    optimizer, trainer = gin.get_configurable("OptimizerConfig")(), gin.get_configurable("TrainerConfig")()
    policy, value, frozen = optimizer.groups
    assert (policy.schedule.peak_learning_rate, policy.start_step) == (1e-6, 50)
    assert (value.schedule.peak_learning_rate, value.start_step) == (5e-6, 0) and frozen.frozen
    steps = rollouts.steps(trainer.batch_size)
    assert trainer.train_steps % steps == trainer.checkpoint_every % steps == 0
    assert rollouts.length == trainer.sequence_length
    paths = ["policy/output", "value/score", "reference/output", "reward/score"]
    found = {path: group.name for path, group in assign_groups(paths, optimizer.groups).items()}
    assert list(found.values()) == ["policy", "value", "frozen", "frozen"]


def test_the_coefficient_of_pretraining_must_be_given():
    with pytest.raises(ConfigurationError, match="PRETRAINING_COEFFICIENT"):
        load_gin(["gin/runs/ppo_7b.gin"], [*BINDINGS, "PRETRAINING=text"])


@pytest.mark.parametrize("recipe", ["grpo_7b", "grpo_14b", "grpo_tiny", "ppo_tiny"])
def test_every_recipe_makes_rollouts_that_divide(recipe):
    load_gin([f"gin/runs/{recipe}.gin"], [one for one in BINDINGS if "tiny" not in recipe or "OUTPUT" in one])
    trainer, rollouts = gin.get_configurable("TrainerConfig")(), gin.get_configurable("RolloutConfig")()
    steps = rollouts.steps(trainer.batch_size)
    assert trainer.train_steps % steps == trainer.checkpoint_every % steps == 0
    kind = GRPOConfig if "grpo" in recipe else PPOConfig
    assert isinstance(gin.query_parameter("rlhf.algorithm").configurable.wrapped(1.0, 1.0), kind)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Run folders of a policy, a reward model, and a reward model over another vocabulary."""
    folder, sizes = tmp_path_factory.mktemp("checkpoints"), dict(vocab_size=464, num_layers=1)
    return {
        "policy": checkpoint(folder, "policy", small_model(**sizes)),
        "reward": checkpoint(folder, "reward", small_model(head="scalar", **sizes), seed=1),
        "other": checkpoint(folder, "other", small_model(head="scalar", **sizes), ranks=range(255, -1, -1)),
    }


ALGORITHMS = {"ppo": PPOConfig(0.0, 1.0), "grpo": GRPOConfig(0.0, 1.0)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("with_reward", [True, False])
def test_models_begin_as_their_checkpoints(checkpoints, algorithm, with_reward, monkeypatch):
    """Reference as policy, value as reward model; without a reward model the value begins as the policy, at 0."""
    policy, reward = checkpoints["policy"], checkpoints["reward"] if with_reward else None
    tokenizer = qwen_jax.rlhf.load_tokenizer(policy)
    monkeypatch.setattr(qwen_jax.rlhf, "default_tokenizer", lambda: tokenizer)
    models = actor_critic(small_model(vocab_size=464, num_layers=1), ALGORITHMS[algorithm], reward)
    weights = qwen_jax.rlhf._initial_weights(models, policy, reward)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        nn.meta.unbox(jax.eval_shape(lambda: models.init_params(jax.random.key(0)))),
    )
    weights.check(abstract)
    loaded = weights.load(abstract)
    theirs = load_params(policy)[1]
    for name in ("policy", "reference"):
        jax.tree.map(np.testing.assert_array_equal, loaded[name], theirs)
    others = {"value"} if algorithm == "ppo" else set()
    assert set(abstract) == {"policy", "reference"} | others | ({"reward"} if with_reward else set())
    if algorithm == "ppo":
        expected = load_params(reward)[1] if with_reward else {k: v for k, v in theirs.items() if k != "output"}
        assert loaded["value"].keys() == expected.keys()
        jax.tree.map(np.testing.assert_array_equal, loaded["value"], expected)


def test_a_reward_model_of_another_vocabulary_or_without_head_is_refused(checkpoints, monkeypatch):
    tokenizer = qwen_jax.rlhf.load_tokenizer(checkpoints["policy"])
    monkeypatch.setattr(qwen_jax.rlhf, "default_tokenizer", lambda: tokenizer)
    model = small_model(vocab_size=464, num_layers=1)
    with pytest.raises(ValueError, match="has another vocabulary than VOCABULARY"):
        actor_critic(model, ALGORITHMS["ppo"], checkpoints["other"])
    with pytest.raises(ValueError, match="has no scalar head: name a reward model"):
        actor_critic(model, ALGORITHMS["ppo"], checkpoints["policy"])
    with pytest.raises(ValueError, match=re.escape("464 rows of vocabulary and the policy 512")):
        actor_critic(small_model(vocab_size=512, num_layers=1), ALGORITHMS["ppo"], checkpoints["reward"])


def test_models_that_do_not_read_the_conversations_of_a_run_are_refused(checkpoints, tmp_path, monkeypatch):
    """A policy of another vocabulary, and a reward model of shorter conversations, before data are looked for."""
    tokenizer, sizes = qwen_jax.rlhf.load_tokenizer(checkpoints["policy"]), dict(vocab_size=464, num_layers=1)
    monkeypatch.setattr(qwen_jax.rlhf, "default_tokenizer", lambda: tokenizer)
    foreign = checkpoint(tmp_path, "foreign", small_model(**sizes), ranks=range(255, -1, -1))
    short = checkpoint(tmp_path, "short", small_model(head="scalar", context_length=15, **sizes))
    for changes, message in (
        ({"initial_checkpoint": foreign}, "foreign was trained with another vocabulary"),
        ({"reward_checkpoint": short}, "SEQUENCE_LENGTH 16 is more than the context_length 15 of REWARD_CHECKPOINT"),
    ):
        settings = {"initial_checkpoint": checkpoints["policy"], "reward_checkpoint": checkpoints["reward"]} | changes
        with pytest.raises(ValueError, match=message):
            qwen_jax.rlhf.rlhf(
                model=small_model(**sizes),
                optimizer=optimizer(),
                trainer=TrainerConfig(4, 4, 16),
                algorithm=ALGORITHMS["ppo"],
                rollouts=RolloutConfig(16, 8, 4),
                prompts="queries",
                output_dir=tmp_path / "run",
                cache_dir=tmp_path / "cache",
                **settings,
            )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_ppo_reads_as_its_policy(tmp_path):
    """By every way to read one: whole, by layers, and as initial weights."""
    trainer = rollout_trainer(tmp_path / "run", steps=4, reward_model=True)
    trainer.run()
    vocabulary = tmp_path / "bytes.tiktoken"
    write_ranks({bytes([byte]): byte for byte in range(256)}, vocabulary)
    write_run_files(tmp_path / "run", trainer.model.config, vocabulary)
    policy = jax.device_get(trainer.state.all_params["policy"])
    _, params = load_params(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params, policy)
    _, loaded = load_pretrained(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), policy)
    weights = open_weights(tmp_path / "run")
    np.testing.assert_array_equal(weights.read("layers/mlp/up/kernel", 0), policy["layers"]["mlp"]["up"]["kernel"][0])
