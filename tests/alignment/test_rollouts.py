"""The loop of PPO: rollouts by the engine, judged and handed to updates; resumed exactly; on any mesh."""

import json
import math
import os
import signal
import types

import jax
import numpy as np
import pytest

from qwen_jax.alignment.grpo import GRPOConfig
from qwen_jax.alignment.ppo import PPOConfig
from qwen_jax.alignment.responses import read_prompts, response_seed
from qwen_jax.alignment.rollouts import RolloutConfig
from qwen_jax.checkpoints.run_folder import CheckpointError
from qwen_jax.distributed.hosts import JobConfig, connect
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.callbacks import Callback
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.reporting import TrainingDiverged
from tests.alignment.fakes import FakePrompts, optimizer, rollout_trainer, share_of_sevens
from tests.fakes import FakeExamples, small_model
from tests.jobs import outputs_of_job, start_job


def rollout_rows(folder):
    """The rows of metrics that rollouts wrote, without their times."""
    rows = [row for row in read_metrics(folder) if "rollout/reward" in row]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def leaves(state):
    return jax.tree.map(np.asarray, jax.device_get((state.params, state.frozen, state.opt_state, state.extra)))


def assert_same_bits(state, other):
    jax.tree.map(np.testing.assert_array_equal, leaves(state), leaves(other))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight updates in one go: two rollouts of eight responses, each in two minibatches, twice."""
    trainer = rollout_trainer(tmp_path_factory.mktemp("straight"))
    trainer.run()
    return trainer


def test_each_rollout_reports_itself(straight):
    first, second = rollout_rows(straight.run_folder.folder)
    assert (first["step"], second["step"]) == (1, 5)
    for row in (first, second):
        assert row["rollout/mismatch"] <= 1.01 and row["rollout/outside_nucleus"] == 0
        assert 1 <= row["rollout/response_length"] <= 8 and 0 <= row["rollout/without_end"] <= 1
        assert row["rollout/entropy"] > 0 and 0 <= row["rollout/reward"] <= 1
        assert all(math.isfinite(value) for value in row.values())
    # The first policy is the reference; the running mean is that of the first rewards.
    assert abs(first["rollout/kl"]) < 1e-4
    assert first["rollout/reward_running_mean"] == pytest.approx(first["rollout/reward"], abs=1e-6)
    seconds = {name for name in straight.latest if "seconds" in name}
    assert seconds == {f"rollout/seconds/{name}" for name in ("weights", "generation", "scoring", "update")}
    updates = [row for row in read_metrics(straight.run_folder.folder) if "policy_loss" in row]
    assert len(updates) == 8
    for name in ("value_loss", "policy_clipped", "value_clipped", "entropy", "policy_kl", "pretraining_loss"):
        assert all(math.isfinite(row[name]) for row in updates), name


def test_responses_are_written_down(straight):
    files = sorted((straight.run_folder.folder / "rollouts").iterdir())
    assert [file.name for file in files] == ["00000000.jsonl", "00000004.jsonl"]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == 8 and lines[0]["prompt"] == lines[1]["prompt"] != lines[2]["prompt"]
    assert all(line["reward"] == pytest.approx(share_of_sevens("", line["response"], None)) for line in lines)


def test_the_running_statistics_are_those_of_all_rewards(straight):
    extra = jax.device_get(straight.state.extra)
    rows = rollout_rows(straight.run_folder.folder)
    assert extra["count"] == 16
    assert extra["mean"] == pytest.approx(np.mean([row["rollout/reward"] for row in rows]), abs=1e-6)
    assert rows[1]["rollout/reward_running_mean"] == pytest.approx(extra["mean"], abs=1e-6)


def test_positions_count_prompts_and_pretraining_rows(straight):
    assert straight.positions == {"prompts": 8, "pretraining": 8 * 4 * 2}


class Stop(Callback):
    """Ends a run after a step: by an error, as a kill does, or by SIGTERM."""

    def __init__(self, step, number=None):
        self.step, self.number = step, number

    def after_step(self, trainer, metrics):
        if trainer.step == self.step:
            if self.number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("step", "number"), [(6, None), (6, signal.SIGTERM), pytest.param(3, signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, straight, step, number):
    """Killed within the second rollout, it makes that one again; stopped by SIGTERM within one, it goes on in it."""
    stopped = rollout_trainer(tmp_path, callbacks=[Stop(step, number)])
    if number is None:
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    else:
        assert stopped.run()["step"] == step
        assert (tmp_path / "experience" / f"{step // 4 * 4}.npz").exists()
    resumed = rollout_trainer(tmp_path)
    resumed.run()
    assert resumed.start_step == (step if number else 4)
    assert_same_bits(resumed.state, straight.state)
    assert resumed.positions == straight.positions
    ours, theirs = rollout_rows(tmp_path), rollout_rows(straight.run_folder.folder)
    assert ours == theirs


@pytest.mark.parametrize("content", [None, b"", b"half", "cut", "without its start"])
def test_a_rollout_that_is_gone_or_damaged_is_named(tmp_path, content):
    producer, path = rollout_trainer(tmp_path).batches, tmp_path / "experience" / "0.npz"
    path.parent.mkdir()
    if content is not None:
        np.savez(path, mask=np.zeros((8, 16)), **({} if content == "without its start" else {"start": 0}))
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step 3 lies within the rollout that began at step 0.*rewind"):
        producer.before_step(types.SimpleNamespace(step=3))


def test_other_sizes_are_another_run(tmp_path):
    sizes = dict(length=16, prompt_length=8, prompts=4, epochs=2, pretraining_rows=2, slots=8)
    changes = ({}, dict(top_p=0.5), dict(epochs=1), dict(seed=1), dict(temperature=2.0))
    made = [rollout_trainer(tmp_path, rollouts=RolloutConfig(**sizes | change)).batches for change in changes]
    assert len({one.fingerprints["prompts"] for one in made}) == len(changes)
    assert len({one.fingerprints["pretraining"] for one in made}) == 1


def test_rollouts_that_no_checkpoint_needs_are_removed(tmp_path):
    """Each stop leaves one; those of checkpoints that are gone would fill the disk."""
    trainer = rollout_trainer(tmp_path)
    producer, folder = trainer.batches, tmp_path / "experience"
    folder.mkdir()
    for name in ("0.npz", "4.npz", "8.npz", "notes.npz"):
        (folder / name).write_bytes(b"")
    for step in (4, 7, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    producer._rollout = {"mask": np.zeros((8, 16))}
    producer.end(types.SimpleNamespace(step=13))
    assert {path.name for path in folder.iterdir()} == {"4.npz", "12.npz", "notes.npz"}


def test_responses_together_are_for_the_machine_to_choose(tmp_path):
    """A run that ran out of memory goes on with fewer slots."""
    few, many = (rollout_trainer(tmp_path, rollouts=RolloutConfig(16, 8, 4, slots=slots)).batches for slots in (2, 8))
    assert few.fingerprints == many.fingerprints


def test_a_policy_that_an_update_has_harmed_makes_no_rollout(tmp_path):
    """The update is named, and not the reward model, which a response of such a policy makes give NaN."""

    class Harm(Callback):
        def after_step(self, trainer, metrics):
            if trainer.step == 3:
                params = trainer.state.params
                params["policy"]["final_norm"]["scale"] = params["policy"]["final_norm"]["scale"] * np.nan

    trainer, made = rollout_trainer(tmp_path, callbacks=[Harm()], reward_model=True, checkpoint_every=8), []
    respond = trainer.batches._responder.respond
    trainer.batches._responder.respond = lambda *arguments: made.append(0) or respond(*arguments)
    with pytest.raises(TrainingDiverged, match="of step 4 is nan"):
        trainer.run()
    assert len(made) == 1


class Watch(Callback):
    """Compares the engine's weights with the trainer's while a rollout is made, and counts compilations."""

    def __init__(self):
        self.shared, self.compilations = [], []

    def begin(self, trainer):
        responder = trainer.batches._responder
        respond = responder.respond

        def watched(*arguments):
            params, engine = trainer.state.all_params["policy"], responder.engine
            self.shared.append(
                {
                    name
                    for name in ("token_embedding", "output", "final_norm")
                    if all(
                        one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()
                        for one, other in zip(
                            jax.tree.leaves(engine.params[name]), jax.tree.leaves(params[name]), strict=True
                        )
                    )
                }
            )
            found = respond(*arguments)
            self.compilations.append(engine.compilations)
            return found

        responder.respond = watched


def test_new_weights_share_what_they_can_and_compile_nothing(tmp_path):
    watch = Watch()
    trainer = rollout_trainer(tmp_path, steps=12, callbacks=[watch])
    trainer.run()
    assert watch.shared == [{"token_embedding", "output", "final_norm"}] * 3
    assert len(set(watch.compilations)) == 1


def test_in_bfloat16_engine_and_trainer_nearly_agree(tmp_path):
    trainer = rollout_trainer(tmp_path, model=small_model(dtype="bfloat16", init_std=0.2), steps=4)
    trainer.run()
    (row,) = rollout_rows(tmp_path)
    assert 1 < row["rollout/mismatch"] <= 1.05


@pytest.mark.parametrize(
    "axes",
    [
        dict(data=2, fsdp=2, tensor=2),
        pytest.param(dict(fsdp=2, tensor=2, sequence=2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_makes_the_same_run(tmp_path, straight, axes):
    trainer = rollout_trainer(tmp_path, mesh=make_mesh(MeshConfig(**axes)))
    trainer.run()
    ours, theirs = rollout_rows(tmp_path), rollout_rows(straight.run_folder.folder)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=2e-3), name
    params = jax.device_get((trainer.state.params, straight.state.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), *params)


def test_the_policy_waits_while_the_value_model_learns(tmp_path):
    trainer = rollout_trainer(tmp_path, steps=4, groups=optimizer(start_step=3))
    moved = {}

    class Look(Callback):
        def after_step(self, trainer, metrics):
            state = jax.device_get(trainer.state.all_params)
            moved[trainer.step] = {
                name: not np.array_equal(state[name]["token_embedding"], before[name]["token_embedding"])
                for name in state
            }

    trainer.prepare()
    before = jax.device_get(trainer.state.all_params)
    trainer.callbacks.append(Look())
    trainer.run()
    assert moved[3] == {"policy": False, "value": True, "reference": False}
    assert moved[4] == {"policy": True, "value": True, "reference": False}


def test_a_reward_model_reads_the_end_token(tmp_path):
    """Of a response that has not ended, too: it is shown the end token in the place of the last one."""
    trainer = rollout_trainer(tmp_path, reward_model=True, steps=4, watched={"sevens": share_of_sevens})
    trainer.run()
    (row,) = rollout_rows(tmp_path)
    assert 0 <= row["rollout/watched/sevens"] <= 1
    producer, params = trainer.batches, trainer.state.all_params
    prompts = read_prompts(FakePrompts(), 0, 4)
    producer._responder.take_weights(params["policy"])
    responses = producer._responder.respond(prompts, 2, 8, 0, lambda done: None)
    judged = producer._scorer(params, responses.tokens, responses.last, 61)
    model, cut = trainer.model, responses.tokens.copy()
    for row, last in enumerate(responses.last):
        cut[row, last], cut[row, last + 1 :] = 61, 0
    whole = jax.device_get(model.rewards(params["reward"], cut, responses.last))
    np.testing.assert_allclose(judged["scores"], whole, atol=1e-5)
    ends = responses.tokens[np.arange(8), responses.last]
    np.testing.assert_array_equal(responses.ended, np.isin(ends, (61, 62)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=6), "TRAIN_STEPS is 6, and a rollout gives 4 updates .* multiple of 4"),
        (dict(checkpoint_every=3), "CHECKPOINT_EVERY is 3"),
        (dict(batch_size=3), "4 prompts x 2 responses does not divide into minibatches of BATCH_SIZE 3"),
        (dict(reward=None), "give one of the two"),
        (
            dict(
                algorithm=GRPOConfig(0.0, 0.0),
                rollouts=RolloutConfig(16, 8, 8, responses_per_prompt=1, epochs=2, slots=8),
            ),
            "GRPOConfig compares the responses to a prompt .* 1 of each: RESPONSES_PER_PROMPT must be at least 2",
        ),
        (dict(reward=lambda prompt, response, answer: float("nan")), "gave nan for prompt 0 of the order, response"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer = rollout_trainer(tmp_path, **change)
        trainer.batches.check_intervals(trainer.config)
        trainer.run()


@pytest.mark.slow
def test_a_reward_model_that_gives_nan_is_named(tmp_path):
    trainer = rollout_trainer(tmp_path, reward_model=True, steps=4)
    trainer.prepare()
    frozen = trainer.state.frozen
    frozen["reward"]["score"] = frozen["reward"]["score"] * np.nan
    with pytest.raises(ValueError, match="reward model gave nan for prompt 0 of the order"):
        trainer.run()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(length=8), "leaves no room for a response after a prompt of 8 tokens"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(prompts=0), "RolloutConfig.prompts must be an integer of at least 1"),
        (dict(epochs=1.5), "RolloutConfig.epochs must be an integer"),
    ],
)
def test_sizes_that_make_no_rollout_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**{"length": 16, "prompt_length": 8, "prompts": 4, **values})


def test_prompts_are_read_with_their_answers():
    prompts = read_prompts(FakePrompts(), 3, 2)
    assert [prompt.index for prompt in prompts] == [3, 4]
    assert len(prompts[0].tokens) == 2 + 3 and prompts[0].answer == (3, 3)
    assert read_prompts(FakePrompts(answers=False), 0, 1)[0].answer == ()
    with pytest.raises(ValueError, match="PACKING = 'padded'"):
        read_prompts(FakeExamples(), 0, 1)


def test_seeds_differ_between_responses_prompts_and_runs():
    seeds = {response_seed(seed, prompt, sample) for seed in (0, 1) for prompt in range(50) for sample in range(4)}
    assert len(seeds) == 400 and all(0 <= seed < 2**32 for seed in seeds)


def test_grpo_trains_without_a_value_model(tmp_path):
    algorithm = GRPOConfig(pretraining_coefficient=0.0, missing_end_penalty=0.1)
    trainer = rollout_trainer(tmp_path, algorithm=algorithm)
    trainer.run()
    assert set(trainer.state.all_params) == {"policy", "reference"} and not trainer.state.extra
    rows = rollout_rows(tmp_path)
    assert len(rows) == 2 and all(0 <= row["rollout/groups_without_signal"] <= 1 for row in rows)
    updates = [row for row in read_metrics(tmp_path) if "policy_loss" in row]
    assert updates[0]["reference_kl"] == pytest.approx(0, abs=1e-6) and updates[-1]["reference_kl"] > 0
    # On policy, and relative: the first loss is that of advantages that sum to 0 in each group.
    assert abs(updates[0]["policy_loss"]) < 1


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_the_reward_rises(tmp_path, algorithm):
    """The share of one letter, from its share by chance to half of all."""
    rollouts = RolloutConfig(16, 8, 16, responses_per_prompt=4, epochs=2, pretraining_rows=0, slots=64)
    configs = {
        "ppo": PPOConfig(0.0, 0.0, kl_coefficient=0.01),
        "grpo": GRPOConfig(0.0, 0.0, kl_coefficient=0.01),
    }
    trainer = rollout_trainer(
        tmp_path,
        algorithm=configs[algorithm],
        rollouts=rollouts,
        batch_size=32,
        steps=60,
        checkpoint_every=60,
        log_every=60,
        groups=optimizer(3e-3, 3e-3, value=algorithm == "ppo"),
    )
    trainer.run()
    rewards = [row["rollout/reward"] for row in rollout_rows(tmp_path)]
    assert rewards[0] < 0.1 and rewards[-1] > 0.5, rewards


def main(address: str, index: str, folder: str) -> None:
    """One of two processes with two devices each."""
    connect(JobConfig(address, 2, int(index)))
    rollout_trainer(folder, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2))).run()


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path, plain_environment, straight):
    program = "import sys; from tests.alignment.test_rollouts import main; main(*sys.argv[1:])"
    outputs_of_job(start_job(program, plain_environment, [[tmp_path]] * 2, devices=2))
    ours, theirs = rollout_rows(tmp_path), rollout_rows(straight.run_folder.folder)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], abs=2e-3), name
