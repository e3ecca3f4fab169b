"""tools/long_context.py on a small random model: the table, its protocol, the picture, and what is refused."""

import importlib

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from qwen_jax.conversion import load_pretrained
from tests.fakes import random_run


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def tool(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("long_context")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random model over single bytes, of training length 16."""
    sizes = dict(hidden_size=32, num_layers=3, num_heads=2, ffn_size=48, context_length=16)
    return random_run(tmp_path_factory.mktemp("long_context"), spread=0.3, **sizes)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "long.txt").write_text("".join(chr(97 + n) for n in np.random.default_rng(1).integers(0, 26, 600)))
    return tmp_path


def test_the_table_is_printed_beside_the_reports_and_drawn(tool, run_folder, text, tmp_path, capsys):
    picture = tmp_path / "deep" / "table.png"
    tool.main([f"--checkpoint={run_folder}", f"--text={text}", f"--output={picture}"])
    shown = capsys.readouterr().out
    assert "512 tokens in 4 stretches; windows from the lowest layer: (16, 72, 128)" in shown
    rows = {line[:34].strip(): line[34:].split() for line in shown.partition("in parts of")[0].splitlines()}
    assert rows["perplexity at a length of"] == ["8", "16", "32", "64", "128"]
    ours = [[float(value.replace(",", "")) for value in rows[name]] for name in tool.VARIANTS]
    assert shown.count("2,645.09") == 1 and shown.count("report, Qwen-7B") == 4
    # Nothing acts within the training length; each part acts beyond it.
    assert all(row[:2] == pytest.approx(ours[0][:2], rel=1e-4) for row in ours)
    assert np.diff(sorted(row[4] for row in ours)).min() > 1
    assert "order of Table 3 there" in shown
    assert picture.read_bytes()[:4] == b"\x89PNG" and [path.name for path in picture.parent.iterdir()] == ["table.png"]


def test_every_length_predicts_the_same_tokens_from_what_its_window_holds(tool, run_folder):
    pieces = tool.stretches([np.arange(300) % 256, np.arange(50), np.arange(129)[::-1]], 128, 10**6)
    np.testing.assert_array_equal(pieces[:, 0], [0, 128, 128])
    np.testing.assert_array_equal(pieces[:, -1], [128, 0, 0])
    model, params = load_pretrained(run_folder)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)[0]))
    for length in (8, 64):
        losses = []
        for piece in pieces:
            for start in range(0, 128, length):
                log_probabilities = np.asarray(forward(jnp.asarray(piece[None, start : start + length])))
                losses += [-log_probabilities[i, piece[start + i + 1]] for i in range(length)]
        assert len(losses) == 3 * 128
        with tqdm(disable=True) as bar:
            found = tool.perplexity(model, params, pieces, length, 128 // length, bar)
        assert found == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)


def test_a_task_gives_its_held_out_documents(tool, run_folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "measure", lambda *_: tool.REPORT)
    tool.main(
        [
            f"--checkpoint={run_folder}",
            "--task=local_files",
            "--tokens=128",
            f"--output={tmp_path / 'table.png'}",
            f"--gin.local_files.pattern={text}/*.txt",
            "--gin.local_files.validation_share=0.99",
            "--shortest_window=4",
        ]
    )
    assert "128 tokens in 1 stretches; windows from the lowest layer: (4, 66, 128)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--training_length=128"], "the 1,025 tokens that one stretch takes"),
        (["--training_length=7"], "even"),
        (["--shortest_window=129"], "between 1 and 128"),
    ],
)
def test_what_cannot_be_measured_is_said(tool, run_folder, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tool.main([f"--checkpoint={run_folder}", f"--text={text}", f"--output={tmp_path / 'table.png'}", *changes])
    assert not (tmp_path / "table.png").exists()


def test_an_unknown_task_is_named(tool, run_folder):
    with pytest.raises(ValueError, match="'no_task' is no task; there are .*python_corpus"):
        tool.main([f"--checkpoint={run_folder}", "--task=no_task"])
