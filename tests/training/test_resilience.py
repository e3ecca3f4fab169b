"""Skipped updates: nothing of the state moves, spikes are judged as documented, and all of it resumes bit for bit."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.run_folder import write_run_files
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.objective import Objective
from qwen_jax.training.objectives import next_token_loss
from qwen_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from qwen_jax.training.reporting import TrainingDiverged
from qwen_jax.training.resilience import WINDOW, SkipConfig, skip_updates
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, prepared_trainer, small_model

BAD = float("nan")


@functools.cache
def transform_and_update(config):
    """adam under `config`, and its compiled update of one parameter by a gradient of a given norm."""
    transform = skip_updates(optax.adam(0.1), config)

    @jax.jit
    def update(params, state, norm):
        updates, state = transform.update({"w": jnp.asarray([norm, 0.0])}, state, params)
        return optax.apply_updates(params, updates), state

    return transform, update


def run(config, norms):
    """(params, state) before and after each gradient with these norms, and whether it was skipped."""
    transform, update = transform_and_update(config)
    params = {"w": jnp.asarray([0.5, -0.0], jnp.float32)}
    state = transform.init(params)
    history = []
    for norm in norms:
        before = (params, state)
        params, state = update(params, state, jnp.float32(norm))
        history.append((before, (params, state), int(state.skipped) > int(before[1].skipped)))
    return history


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_after_a_skipped_update_not_a_bit_has_changed(bad):
    history = run(SkipConfig(nonfinite=True), [1.0, bad, 1.0])
    (params, state), (after, state_after), skipped = history[1]
    assert skipped and bits(params) == bits(after), "the sign of zero included"
    for name in ("inner", "norms", "made"):
        assert bits(getattr(state, name)) == bits(getattr(state_after, name)), name
    assert (int(state_after.skipped), int(state_after.in_a_row)) == (1, 1)
    # What follows is as if the bad batch had never been.
    clean = run(SkipConfig(nonfinite=True), [1.0, 1.0])
    assert bits(history[2][1][0]) == bits(clean[1][1][0]) and int(history[2][1][1].in_a_row) == 0


def test_by_default_nothing_is_skipped_and_the_update_is_the_optimizer_s_own():
    norms = [1.0, 2.0, 1e6, 3.0]
    wrapped = run(SkipConfig(), norms)
    optimizer = optax.adam(0.1)
    params = {"w": jnp.asarray([0.5, -0.0], jnp.float32)}
    state = optimizer.init(params)
    for norm, (_, (after, _), skipped) in zip(norms, wrapped, strict=True):
        updates, state = jax.jit(optimizer.update)({"w": jnp.asarray([norm, 0.0])}, state, params)
        params = optax.apply_updates(params, updates)
        assert not skipped
        np.testing.assert_allclose(after["w"], params["w"], rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    norms=st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, 50.0, BAD, float("inf")]), min_size=1, max_size=40),
    factor=st.sampled_from([1.5, 20.0]),
    least=st.sampled_from([1, 4]),
)
def test_spikes_are_judged_by_the_median_of_the_updates_that_were_made(norms, factor, least):
    config = SkipConfig(nonfinite=True, spike_factor=factor, least_history=least)
    made: list[float] = []
    for norm, (_, _, skipped) in zip(norms, run(config, norms), strict=True):
        spike = len(made) >= least and norm > factor * np.median(np.float32(made[-WINDOW:]))
        assert skipped == (not np.isfinite(norm) or spike)
        if not skipped:
            made.append(norm)


def test_the_window_forgets_what_is_older():
    config = SkipConfig(spike_factor=3.0, least_history=1)
    history = run(config, [1.0] * WINDOW + [2.5] * WINDOW + [7.0, 8.0])
    assert not any(skipped for _, _, skipped in history[:-1]) and history[-1][2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spike_factor": 1.0}, "spike_factor"),
        ({"least_history": 0}, "least_history"),
        ({"least_history": 129}, "least_history"),
        ({"most_in_a_row": 0}, "most_in_a_row"),
        ({"nonfinite": "false"}, "nonfinite must be True or False"),
        ({"spike_factor": "ten"}, "spike_factor"),
        ({"most_in_a_row": 2.5}, "most_in_a_row must be an integer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SkipConfig(**values)


def poisoned_loss(model, params, batch, rng):
    """The usual loss, but NaN for a batch that holds token 62, which the fakes never make by themselves."""
    loss, sums = next_token_loss(model, params, batch, rng)
    return jnp.where((batch["tokens"] == 62).any(), jnp.nan, 1.0) * loss, sums


class Poisoned(FakeExamples):
    """Examples [24, 32) and those from `end` on hold token 62."""

    end = 10**9

    def read(self, start, stop):
        batch = super().read(start, stop)
        rows = np.arange(start, stop)
        batch["tokens"][((rows >= 24) & (rows < 32)) | (rows >= self.end), 0] = 62
        return batch


CONFIG = TrainerConfig(
    train_steps=8, batch_size=8, sequence_length=16, log_every=1, checkpoint_every=2, keep_checkpoints=9
)


def trainer(folder, skip, layout=(1, 1, 1), data=None, config=CONFIG, objective=poisoned_loss):
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    write_run_files(folder, small_model(), None)
    return prepared_trainer(
        Qwen(small_model()),
        Objective(objective),
        OptimizerConfig(1e-2, warmup_steps=2, skip=skip),
        config,
        mesh,
        data or Poisoned(),
        None,
        folder,
    )


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip") / "run"
    run = trainer(folder, SkipConfig(nonfinite=True))
    run.run()
    return folder, run


def test_a_run_passes_over_a_bad_batch_and_counts_it(skipping, tmp_path):
    folder, run = skipping
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert [row["skipped_updates"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows[3]["loss"] is None and all(row["loss"] for row in rows[4:])
    assert run.positions == {"train": 64} and int(run.state.step) == 8
    # The schedule counts updates made, and so does what is said of it.
    schedule = learning_rate_schedule(OptimizerConfig(1e-2, warmup_steps=2), 8)
    expected = [float(schedule(made)) for made in (0, 1, 2, 3, 3, 4, 5, 6)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TrainingDiverged, match="the loss of step 4 is nan"):
        trainer(tmp_path / "run", SkipConfig()).run()


def poisoned_gradient(model, params, batch, rng):
    """The usual loss; its gradient is NaN for a batch that holds token 62."""
    loss, sums = next_token_loss(model, params, batch, rng)
    zero = jnp.where((batch["tokens"] == 62).any(), 0.0, 1.0) * params["output"][0, 0]
    # sqrt has an infinite slope at 0, and what comes to it is 0 times that.
    return loss + 0.0 * jnp.sqrt(jnp.abs(zero * zero)), sums


def test_parameters_that_a_gradient_has_destroyed_are_not_saved(tmp_path):
    """The loss of step 4, where a checkpoint is due, is that of the parameters before: finite."""
    run = trainer(tmp_path / "run", SkipConfig(), objective=poisoned_gradient)
    with pytest.raises(TrainingDiverged, match="the gradient norm of step 4 is nan"):
        run.run()
    assert Checkpoints(tmp_path / "run").steps() == [2]


def test_the_statistics_resume_bit_for_bit_even_on_another_mesh(skipping, tmp_path):
    folder, run = skipping
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for step in (6, 8):
        shutil.rmtree(copy / "checkpoints" / str(step))
    resumed = trainer(copy, SkipConfig(nonfinite=True))
    assert resumed.start_step == 4 and int(resumed.state.opt_state.skipped) == 1
    resumed.run()
    assert bits(resumed.state) == bits(run.state)
    moved = trainer(
        copy, SkipConfig(nonfinite=True), layout=(2, 2, 2), config=dataclasses.replace(CONFIG, train_steps=9)
    )
    np.testing.assert_array_equal(moved.state.opt_state.norms, run.state.opt_state.norms)


def test_skipping_can_be_turned_on_in_the_middle_of_a_run(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingDiverged):
        trainer(folder, SkipConfig()).run()
    assert Checkpoints(folder).steps() == [2]
    resumed = trainer(folder, SkipConfig(nonfinite=True))
    assert resumed.start_step == 2
    assert resumed.run()["skipped_updates"] == 1


def test_too_many_in_a_row_end_the_run(tmp_path):
    data = Poisoned()
    data.end = 40
    with pytest.raises(TrainingDiverged, match="3 updates in a row were skipped, the last at step 8"):
        trainer(tmp_path / "run", SkipConfig(nonfinite=True, most_in_a_row=3), data=data).run()
