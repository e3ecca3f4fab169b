"""The loop: it learns, resumes bit for bit, compiles once, survives damaged checkpoints, refuses foreign ones."""

import dataclasses
import json
import math
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.checkpoints.arrays import load_params, save_params
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.run_folder import CheckpointError, write_run_files
from qwen_jax.conversion.initial_weights import InitialWeights
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training import trainer as trainer_module
from qwen_jax.training.callbacks import Callback
from qwen_jax.training.goodput import Goodput
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.profiling import OutOfMemory
from qwen_jax.training.reporting import TrainingDiverged
from qwen_jax.training.run import Run
from qwen_jax.training.step import batch_shapes
from qwen_jax.training.trainer import Trainer, standard_callbacks
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import (
    FakeExamples,
    ImageExamples,
    ImageModel,
    new_trainer,
    prepared_trainer,
    small_model,
    squared_error,
)

CONFIG = TrainerConfig(
    train_steps=12,
    batch_size=8,
    sequence_length=16,
    log_every=1,
    eval_every=5,
    checkpoint_every=4,
    keep_checkpoints=2,
)


def trainer(
    folder,
    config=CONFIG,
    layout=(1, 1, 1),
    model=None,
    data=None,
    initial=None,
    learning_rate=1e-2,
    make=prepared_trainer,
):
    model = model or small_model()
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    made = make(
        Qwen(model),
        next_token_prediction(),
        OptimizerConfig(learning_rate, warmup_steps=2),
        config,
        mesh,
        data or FakeExamples(),
        FakeExamples(count=13, repeat=False),
        folder,
        None if initial is None else InitialWeights(initial),
    )
    write_run_files(folder, model, None)
    return made


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    folder.mkdir()
    result = trainer(folder).run()
    return folder, result


def test_it_learns_and_writes_every_metric(unbroken):
    folder, result = unbroken
    rows = read_metrics(folder)
    assert losses(folder).keys() == set(range(1, 13)) and losses(folder)[12] < losses(folder)[1] - 0.5
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 5, 10, 12]
    for row in evaluations:
        assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))
        assert row["eval/bits_per_byte"] == pytest.approx(row["eval/loss"] / math.log(2) / 2.0)
    last = [row for row in rows if "loss" in row][-1]
    assert {"accuracy", "gradient_norm", "learning_rate", "tokens_per_second", "data_wait"} <= last.keys()
    assert result["step"] == 12 and list((folder / "tensorboard").glob("events*"))


def test_on_cpus_a_step_begins_when_the_one_before_has_ended(tmp_path):
    """A program for CPUs takes its memory when it is called, so two steps at once would take twice as much."""
    made, ended = trainer(tmp_path / "run", config=dataclasses.replace(CONFIG, eval_batches=0, train_steps=5)), []
    step = made._train_step

    def watched(state, batch):
        ended.append(all(leaf.is_ready() for leaf in jax.tree.leaves(state)))
        return step(state, batch)

    made._train_step = watched
    made.run()
    assert ended == [True] * 5


def test_no_batches_of_held_out_text_are_no_held_out_loss(tmp_path):
    result = trainer(tmp_path / "run", config=dataclasses.replace(CONFIG, eval_batches=0, train_steps=5)).run()
    assert result["step"] == 5 and not [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row]


def test_only_the_newest_checkpoints_are_kept(unbroken):
    folder, _ = unbroken
    assert Checkpoints(folder).steps() == [8, 12]


def test_a_run_that_stopped_goes_on_bit_for_bit(unbroken, tmp_path):
    folder, _ = unbroken
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "12")
    # What a kill leaves: rows after the checkpoint, the last of them cut short.
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    resumed = trainer(copy)
    assert resumed.start_step == 8 and resumed.positions == {"train": 64}
    resumed.run()
    assert losses(copy) == losses(folder)
    for one, other in zip(jax.tree.leaves(load_params(copy)[1]), jax.tree.leaves(load_params(folder)[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    steps = [row["step"] for row in read_metrics(copy) if "loss" in row]
    assert steps == sorted(set(steps))


def test_a_run_that_was_killed_before_its_first_checkpoint_says_everything_once(tmp_path):
    folder, config = tmp_path / "run", dataclasses.replace(CONFIG, train_steps=3)
    trainer(folder, config=config).run()
    shutil.rmtree(folder / "checkpoints" / "3")
    trainer(folder, config=config).run()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_run_goes_on_on_another_mesh(unbroken, tmp_path):
    folder, _ = unbroken
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "12")
    trainer(copy, layout=(2, 2, 2)).run()
    for step, loss in losses(folder).items():
        assert losses(copy)[step] == pytest.approx(loss, rel=1e-5)


def test_a_trainer_costs_nothing_until_it_is_prepared_and_then_compiles_once(tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    before = len(jax.live_arrays())
    run = trainer(tmp_path / "run", make=new_trainer)
    assert not compiled and len(jax.live_arrays()) == before and not (tmp_path / "run" / "checkpoints").exists()
    run.prepare()
    assert compiled, "the listener hears compilations"
    compiled.clear()
    run.run()
    assert not compiled


class TwoStreams:
    """Batches that are made, not read, from two streams; what they hold depends on the weights of the run."""

    columns, fingerprints, waited = token_columns(16), {"prompts": "a", "train": "b"}, 0.0

    def __init__(self, mesh):
        self.shapes, self.started, self.closed = batch_shapes(mesh, 8, self.columns), [], 0
        self.seen, self.positions = None, dict.fromkeys(self.fingerprints, 0)

    def start(self, positions):
        self.positions = dict(positions)
        self.started.append(self.positions)

    def next(self):
        rows = FakeExamples().read(self.positions["train"], self.positions["train"] + 8)
        rows["tokens"] = (rows["tokens"] + (self.seen > 0)) % 61
        self.positions = {"prompts": self.positions["prompts"] + 3, "train": self.positions["train"] + 8}
        return {name: jax.device_put(rows[name], shape.sharding) for name, shape in self.shapes.items()}

    def close(self):
        self.closed += 1


class HandOver(Callback):
    """Gives the producer what it needs of the newest weights, before each batch is made."""

    def before_step(self, trainer):
        trainer.batches.seen = float(trainer.state.params["output"][0, 0])


def test_batches_may_come_from_any_producer_with_several_streams(tmp_path):
    def run(steps):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        config, optimizer = dataclasses.replace(CONFIG, train_steps=steps), OptimizerConfig(1e-2, schedule="constant")
        held = Run(tmp_path / "run", Activity(), Goodput(tmp_path / "run"))
        batches = TwoStreams(mesh)
        callbacks = [*standard_callbacks(held, config, optimizer, None), HandOver()]
        made = Trainer(held, Qwen(small_model()), next_token_prediction(), optimizer, config, mesh, batches, callbacks)
        made.run()
        return made, batches

    (tmp_path / "run").mkdir()
    _, batches = run(4)
    assert batches.started == [{"prompts": 0, "train": 0}] and batches.closed == 1
    made, batches = run(6)
    assert batches.started == [{"prompts": 12, "train": 32}]
    assert made.positions == {"prompts": 18, "train": 48} == Checkpoints.metadata(tmp_path / "run", 6)["positions"]
    assert losses(tmp_path / "run").keys() == set(range(1, 7))


class HalfOfTheWeights:
    """The blocks alone, made of ones; what does not fit is found in `check`."""

    def __init__(self, problem=None):
        self.problem = problem

    def check(self, abstract):
        assert abstract["layers"]["mlp"]["up"]["kernel"].sharding.mesh.size == 2
        if self.problem:
            raise CheckpointError(self.problem)

    def load(self, abstract):
        return {
            "layers": jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape), leaf.sharding), abstract["layers"])
        }


def test_a_part_of_the_weights_may_come_from_elsewhere_and_is_checked_before_compiling(tmp_path, monkeypatch):
    mesh, data = make_mesh(MeshConfig(), jax.devices()[:2]), FakeExamples()
    arguments = (Qwen(small_model()), next_token_prediction(), OptimizerConfig(1e-2), CONFIG, mesh, data, None)
    begun, plain = (prepared_trainer(*arguments, tmp_path / "a", weights) for weights in (HalfOfTheWeights(), None))
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(begun.state.params["layers"]))
    np.testing.assert_array_equal(begun.state.params["output"], plain.state.params["output"])
    monkeypatch.setattr(trainer_module, "compile_run", None)
    with pytest.raises(CheckpointError, match="another number of layers"):
        prepared_trainer(*arguments, tmp_path / "b", HalfOfTheWeights("another number of layers"))


def newest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "file missing", "metadata missing"])
def test_the_last_good_checkpoint_is_used(unbroken, tmp_path, damage, caplog):
    folder, _ = unbroken
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    bad = copy / "checkpoints" / "12"
    if damage == "truncated":
        file = newest_file(bad / "params")
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
    elif damage == "file missing":
        newest_file(bad / "optimizer").unlink()
    else:
        (bad / "_CHECKPOINT_METADATA").unlink()
    caplog.set_level("WARNING")
    resumed = trainer(copy)
    assert resumed.start_step == 8
    assert str(bad) in caplog.text and (copy / "checkpoints" / "unreadable-12").is_dir()
    assert "incompatible handler" not in caplog.text, "the cause is named, not what Orbax makes of it"
    resumed.run()
    assert losses(copy) == losses(folder)


def test_when_no_checkpoint_can_be_read_all_are_named(unbroken, tmp_path):
    folder, _ = unbroken
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for step in ("8", "12"):
        newest_file(copy / "checkpoints" / step / "params").unlink()
    with pytest.raises(CheckpointError, match="checkpoints/12.*checkpoints/8"):
        trainer(copy)
    assert (copy / "checkpoints" / "8").is_dir()


def test_want_of_memory_while_restoring_is_no_fault_of_the_checkpoints(unbroken, tmp_path, monkeypatch, caplog):
    copy = tmp_path / "run"
    shutil.copytree(unbroken[0], copy)
    fresh = tmp_path / "fresh"

    def without_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", without_memory)
        for folder, initial in ((copy, None), (fresh, copy)):
            with pytest.raises(OutOfMemory, match="out of memory while restoring the state .allocate 17179869184 by"):
                trainer(folder, initial=initial)
    assert "cannot be read" not in caplog.text
    assert trainer(copy).start_step == 12


def test_other_data_is_refused(unbroken, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(unbroken[0], copy)
    with pytest.raises(CheckpointError, match="other data.*INITIAL_CHECKPOINT"):
        trainer(copy, data=FakeExamples(seed=1))


def test_a_new_run_starts_from_the_weights_of_another(unbroken, tmp_path):
    folder, _ = unbroken

    begun = trainer(tmp_path / "run", initial=folder, layout=(1, 2, 1))
    assert begun.start_step == 0
    for one, other in zip(jax.tree.leaves(begun.state.params), jax.tree.leaves(load_params(folder)[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(CheckpointError, match=r"layers/mlp/up/kernel is \[2, .* there and \[3, .* in the model"):
        trainer(tmp_path / "run", initial=folder, model=small_model(num_layers=3))


def test_a_run_that_diverges_stops_and_saves_nothing_after(tmp_path):

    with pytest.raises(TrainingDiverged, match="PEAK_LEARNING_RATE"):
        trainer(tmp_path / "run", learning_rate=1e30).run()
    saved = Checkpoints(tmp_path / "run").steps()
    assert not saved or max(saved) < max(row["step"] for row in read_metrics(tmp_path / "run"))


def test_weights_alone_are_saved_whole_or_not_at_all(tmp_path):
    config = small_model()
    shapes = nn.meta.unbox(abstract_params(Qwen(config)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    save_params(tmp_path / "w", config, params, None)
    loaded_config, loaded = load_params(tmp_path / "w")
    assert loaded_config == config and loaded["output"].dtype == np.float32
    assert all(np.all(leaf == 0.5) for leaf in jax.tree.leaves(loaded))
    with pytest.raises(CheckpointError, match="not empty"):
        save_params(tmp_path / "w", config, params, None)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        load_params(tmp_path / "w", step=7)
    with pytest.raises(CheckpointError, match="not a run folder"):
        load_params(tmp_path)
    (tmp_path / "w" / "model_config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(CheckpointError, match="model_config.json"):
        load_params(tmp_path / "w")


def test_an_objective_without_correct_predictions_trains_evaluates_and_reports(tmp_path, capsys):
    """Another model, columns without tokens, metrics of its own, running statistics that resume."""

    def made(folder, layout=(1, 1, 1), **changes):
        mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
        config = dataclasses.replace(CONFIG, train_steps=6, eval_every=3, **changes)
        held_out = ImageExamples(count=13, repeat=False)
        arguments = (ImageModel(), squared_error(True), OptimizerConfig(1e-2), config, mesh, ImageExamples(), held_out)
        return prepared_trainer(*arguments, folder)

    result = made(tmp_path / "run").run()
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/absolute_error" in row] == [0, 3, 6]
    trained = [row for row in rows if "loss" in row]
    assert trained[-1]["absolute_error"] < trained[0]["absolute_error"] and "accuracy" not in trained[0]
    assert result["eval/size"] == 13 and "held-out absolute error 0." in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    labels = ImageExamples().read(0, 48)["label"].sum()
    resumed = made(tmp_path / "run", layout=(2, 2, 2))
    assert resumed.start_step == 4
    resumed.run()
    np.testing.assert_allclose(resumed.state.extra["labels"], labels, rtol=1e-5)
