"""A run folder in use: one holder at a time, nothing foreign, nothing left of a start that did nothing."""

import io
import os
import signal
import sys

import pytest

from qwen_jax.checkpoints.run_folder import CheckpointError, check_same_model, write_run_files
from qwen_jax.distributed.preemption import PreemptionHandler
from qwen_jax.distributed.watchdog import Watchdog
from qwen_jax.training.metrics import MetricsWriter
from qwen_jax.training.run import open_run
from tests.fakes import small_model


def same(folder):
    check_same_model(folder, small_model())


def test_a_folder_has_one_holder_and_its_parts_go_together(tmp_path):
    watchdog = Watchdog()
    with open_run(tmp_path / "run", same, watchdog=watchdog) as run:
        write_run_files(run.folder, small_model(), None)
        assert watchdog.folder == run.folder and watchdog.activity is run.activity
        assert run.skipped_examples("train") == [] and "starting" in run.goodput.shares()
        with pytest.raises(ValueError, match="is in use by process"), open_run(tmp_path / "run", same):
            pass
    with open_run(tmp_path / "run", same):
        pass
    assert (tmp_path / "run" / "model_config.json").exists()


def test_a_folder_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_run("~/run", same) as run:
        assert run.folder == tmp_path / "run"


def test_a_start_that_made_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), open_run(tmp_path / "run", same):
        raise RuntimeError("the corpus is not there")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), open_run(tmp_path / "mine", same):
        raise RuntimeError("a folder that was there before stays")
    assert (tmp_path / "mine").exists()


def test_a_folder_that_cannot_be_made_is_named_with_the_cause(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileExistsError, match="link"), open_run(tmp_path / "link", same):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("mine")
    write_run_files(tmp_path / "other", small_model(num_layers=3), None)
    for name, message in (
        ("file", "is a file: choose a folder"),
        ("foreign", "holds 'thesis.doc' and is not a run folder"),
        ("other", "num_layers 2 here, 3 there"),
    ):
        with pytest.raises(CheckpointError, match=message), open_run(tmp_path / name, same):
            pass
    assert not (tmp_path / "foreign" / ".lock").exists()


def broken(*_):
    raise BrokenPipeError


def test_ctrl_c_saves_where_nobody_reads_the_screen_any_more(tmp_path, monkeypatch):
    """As in `train 2>&1 | tee log`, where it ends `tee`, too."""
    with pytest.raises(KeyboardInterrupt, match="the run is saved"), PreemptionHandler() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", broken)
            signal.raise_signal(signal.SIGINT)
        assert stop.should_stop(1) and stop.cause == "Ctrl-C"
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    writer = MetricsWriter(tmp_path, 0, 2)
    writer.say("seen")
    assert "0/2" in screen.getvalue() and "seen" in screen.getvalue()
    monkeypatch.setattr(screen, "write", broken)
    monkeypatch.setattr(screen, "flush", broken)
    writer.progress(2, {"loss": "1.0"})
    writer.say("not seen")
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "loss": 1.0}\n'
