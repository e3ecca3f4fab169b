"""The loss curve of a run, as a picture."""

import importlib
import json

import matplotlib.pyplot as plt
import pytest


@pytest.fixture
def tool(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("plot_run")


def test_a_picture_is_drawn_into_the_run(tool, tmp_path):
    rows = [{"step": n, "loss": 5 - n / 10, "learning_rate": 1e-3, "tokens_per_second": 100.0} for n in range(1, 21)]
    rows += [{"step": n, "eval/loss": 5.0, "eval/bits_per_byte": 2.0} for n in (0, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo')
    tool.main([str(tmp_path)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))


def test_a_run_on_pairs_that_an_update_has_ended_is_drawn(tool, tmp_path):
    """Its held-out metrics have no bits per byte, and its last row has neither a gradient nor a pace."""
    row = {"loss": 0.6, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 100.0}
    last = {"step": 3, "loss": 0.5, "learning_rate": 1e-3, "gradient_norm": None}
    rows = [{"step": 1, **row}, {"step": 2, **row}, {"step": 2, "eval/loss": 0.6931, "eval/accuracy": 0.5}, last]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    figure = tool.compose([tmp_path])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    plt.close(figure)
    assert labels == [f"{tmp_path.name}: training", f"{tmp_path.name}: held out, 0.693 at the end"]


def test_the_time_of_runs_is_drawn_where_they_keep_an_account(tool, tmp_path):
    row = {"step": 1, "loss": 5.0, "learning_rate": 1e-3, "tokens_per_second": 100.0}
    start = {"began": 0.0, "to": 9, "kept": 9, "seconds": {"starting": 2.5, "steps": 7.5}}
    again = {**start, "began": 30.0, "seconds": {"restoring": 2.0, "steps": 8.0}}
    for name, starts in (("one", [start]), ("two", [start, again]), ("none", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        if starts:
            (tmp_path / name / "goodput.json").write_text(json.dumps({"starts": starts}))

    def texts(*runs):
        figure = tool.compose([tmp_path / run for run in runs])
        try:
            return [text.get_text() for axes in figure.axes for text in axes.texts], figure.axes[2]
        finally:
            plt.close(figure)

    assert texts("none")[0] == []
    # The second run: 15.5 of 40 s in steps.
    drawn, axes = texts("one", "none", "two")
    assert drawn == ["one: goodput 75.0%", "two: goodput 38.8%"]
    bars = sorted((bar.get_y(), bar.get_x(), bar.get_width()) for bar in axes.patches)
    for place in {y for y, _, _ in bars}:
        assert sum(width for y, _, width in bars if y == place) == pytest.approx(1)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["steps", "starting", "restoring", "lost steps", "idle"]


def test_a_run_without_metrics_is_named(tool, tmp_path):
    with pytest.raises(ValueError, match="no training loss yet"):
        tool.main([str(tmp_path)])
