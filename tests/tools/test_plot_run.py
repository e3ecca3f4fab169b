"""The loss curve of a run, as a picture."""

import importlib
import json

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


def test_a_run_without_metrics_is_named(tool, tmp_path):
    with pytest.raises(ValueError, match="no training loss yet"):
        tool.main([str(tmp_path)])
