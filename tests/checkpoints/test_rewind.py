"""Going back: the batches seen after it are those expected, nothing is lost, a kill in the middle is harmless."""

import json
import shutil
import subprocess

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.checkpoints import rewind as rewind_module
from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.rewind import finish_rewinds, read_rewinds, rewind, skipped_spans
from qwen_jax.checkpoints.run_folder import CheckpointError, saved_steps, write_run_files
from qwen_jax.files import locked
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.batches import after_skipped
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, prepared_trainer, small_model
from tests.warm_python import python

CONFIG = TrainerConfig(
    train_steps=12, batch_size=8, sequence_length=16, log_every=1, checkpoint_every=4, keep_checkpoints=9
)


def train(folder):
    """Runs to the end; returns where the batches began that were read."""
    data = FakeExamples()
    write_run_files(folder, small_model(), None)
    made = prepared_trainer(
        Qwen(small_model()),
        next_token_prediction(),
        OptimizerConfig(1e-2, warmup_steps=2),
        CONFIG,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        data,
        None,
        folder,
    )
    made.run()
    # Two more are read ahead.
    return [start for start, _ in data.reads][: 12 - made.start_step]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewind") / "run"
    assert train(folder) == list(range(0, 96, 8))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


def test_the_batches_after_a_rewind_are_those_expected(run):
    before = losses(run)
    made = rewind(run, 4, skip_examples=20)
    assert (made.to_step, made.from_step, made.skipped) == (4, 12, (32, 52))
    assert saved_steps(run) == [4] and saved_steps(run / made.folder) == [8, 12]
    assert train(run) == [52 + 8 * index for index in range(8)]
    after = losses(run)
    assert [step for step in after if after[step] == before[step]] == [1, 2, 3, 4]
    assert Checkpoints.metadata(run, 8)["skipped_examples"] == {"train": [[32, 52]]}
    # What was set aside is a run folder itself, with the metrics as they were.
    assert losses(run / made.folder) == before
    load_params(run / made.folder, step=12)
    # A second time, on top of the first: what is passed over adds up.
    again = rewind(run, 4, skip_examples=8)
    assert again.skipped == (52, 60) and again.folder == "rewound_2"
    assert train(run)[0] == 60


def test_from_further_back_as_many_new_examples_are_passed_over_as_asked_for(run):
    rewind(run, 8, skip_examples=16)
    assert train(run) == [80, 88, 96, 104]
    # The run would go on with 32 to 63 and 80 to 95: six steps.
    assert rewind(run, 4, skip_examples=48).skipped == (32, 96)
    assert train(run)[0] == 96


def test_without_a_span_the_run_repeats_itself(run):
    weights = jax.tree.leaves(load_params(run)[1])
    rewind(run, 8)
    assert train(run) == [64, 72, 80, 88]
    assert all((one == other).all() for one, other in zip(weights, jax.tree.leaves(load_params(run)[1]), strict=True))


def test_a_rewind_that_was_killed_is_finished_by_the_next_start(run, monkeypatch):
    monkeypatch.setattr(rewind_module, "finish_rewinds", lambda folder: None)
    rewind(run, 4, skip_examples=8)
    assert saved_steps(run) == [4, 8, 12] and not read_rewinds(run)[0].done
    (run / "rewound_1" / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "12").rename(run / "rewound_1" / "checkpoints" / "12")
    finish_rewinds(run)
    assert saved_steps(run) == [4] and saved_steps(run / "rewound_1") == [8, 12] and read_rewinds(run)[0].done
    assert train(run)[0] == 40


def test_bad_input_changes_nothing(run, tmp_path):
    for arguments, kind, message in (
        ((run, 5), CheckpointError, "no checkpoint of step 5; it has 4, 8, 12"),
        ((run, 4, -1), ValueError, "at least 0, found -1"),
        ((run, 4, 8, "prompts"), CheckpointError, "no data stream 'prompts'; it has train"),
        ((tmp_path, 4), CheckpointError, "not a run folder"),
    ):
        with pytest.raises(kind, match=message):
            rewind(*arguments)
    assert saved_steps(run) == [4, 8, 12] and not (run / "rewinds.json").exists()
    (run / "rewinds.json").write_text("[{")
    with pytest.raises(CheckpointError, match="rewinds.json cannot be read"):
        train(run)


def test_the_command_and_a_run_that_is_in_use(run, plain_environment):
    command = [python(), "tools/rewind.py", "--run", run, "--to", "8", "--skip_examples", "16"]
    with locked(run):
        done = subprocess.run(command, env=plain_environment, capture_output=True, text=True)
        assert done.returncode == 2 and "is in use by process" in done.stderr and "Traceback" not in done.stderr
    (run / "no_run").mkdir()
    elsewhere = [*command[:3], run / "no_run", *command[4:]]
    done = subprocess.run(elsewhere, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 2 and "not a run folder" in done.stderr and not list((run / "no_run").iterdir())
    done = subprocess.run(command, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0 and "goes on after step 8 (was 12) and passes over examples 64 to 79" in done.stdout
    assert skipped_spans(run) == [(64, 80)]
    assert json.loads((run / "rewinds.json").read_text())[0]["done"] is True


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=5), st.integers(0, 100))
def test_a_batch_never_begins_inside_a_skipped_span(spans, position):
    spans = [(start, start + length) for start, length in spans]
    found = after_skipped(position, spans)
    inside = [any(start <= index < stop for start, stop in spans) for index in range(position, found + 1)]
    assert not inside[-1] and all(inside[:-1])
