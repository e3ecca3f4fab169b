"""docs/how_to/reward_model.md and dpo.md: their commands, in order, on fewer pairs and a smaller, random model."""

import json
import random

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from qwen_jax.alignment import courtesy
from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.models.config import ModelConfig
from qwen_jax.training.metrics import read_metrics
from tests.pages import blocks, copy_repository, shell

SIZES = dict(vocab_size=1024, hidden_size=64, num_layers=2, num_heads=2, head_dim=32, ffn_size=128, context_length=256)


@pytest.fixture
def folder(tmp_path, tool, monkeypatch):
    """A copy of the repository with fewer pairs and a smaller model, and a base model in the place of the demo's."""
    copy_repository(tmp_path)
    tool_file = tmp_path / "tools/make_preferences.py"
    text = tool_file.read_text()
    for default, fewer in (("default=1000,", "default=600,"), ("default=4000,", "default=1000,")):
        assert default in text
        text = text.replace(default, fewer)
    tool_file.write_text(text)
    sizes = "".join(f"ModelConfig.{name} = {value}\n" for name, value in SIZES.items())
    (tmp_path / "gin/models/tiny.gin").write_text(sizes + "ModelConfig.dtype = 'float32'\n")
    draw = random.Random(1)
    texts = [f"{prompt}\n{courtesy.response(prompt, draw)}" for prompt in courtesy.prompts() for _ in range(3)]
    texts.append("system You are a helpful assistant. user assistant " * 40)
    vocabulary = tmp_path / "runs/demo/vocabulary.tiktoken"
    write_ranks(tool("build_tokenizer").train(texts, 700), vocabulary)
    config, numbers = ModelConfig(dtype="float32", **SIZES), np.random.default_rng(0)
    flat = {
        path: (numbers.standard_normal(shape) * 0.05 + ("scale" in path)).astype(np.float32)
        for path, shape in parameter_shapes(config).items()
    }
    save_params(tmp_path / "runs/demo/run", config, unflatten_dict(flat, sep="/"), vocabulary)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_page_on_reward_models(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = {}
    for kind, text in blocks("reward_model.md"):
        if kind == "sh":
            done = shell(text, folder)
        elif kind == "python":
            exec(text, names)
    assert "check: scores differ by" in done.stdout
    held_out = json.loads((folder / "runs/rewards/results.json").read_text())
    assert held_out["RM"]["courtesy"]["accuracy"] > 0.8
    assert held_out["RM"]["courtesy"]["accuracy"] >= held_out["PMP"]["courtesy"]["accuracy"]
    last = [row for row in read_metrics(folder / "runs/reward_tiny") if "eval/accuracy" in row][-1]
    assert last["eval/accuracy"] > 0.8
    rows = [json.loads(line) for line in (folder / "runs/scored.jsonl").read_text().splitlines()]
    assert len(rows) == 500 and all("reward" in row for row in rows)
    polite, rude = names["rewards"]
    assert polite > rude


@pytest.mark.slow
def test_the_page_on_dpo(folder):
    names = {}
    for kind, text in blocks("dpo.md"):
        if kind == "sh":
            shell(text, folder)
        elif kind == "python":
            exec(text, names)
    assert names["after"] > names["before"]
    rows = [row for row in read_metrics(folder / "runs/dpo_tiny") if "eval/accuracy" in row]
    assert rows[0]["eval/margin"] == pytest.approx(0, abs=1e-3) and rows[0]["eval/loss"] == pytest.approx(
        0.6931, abs=1e-3
    )
    assert rows[-1]["eval/accuracy"] > 0.7 and rows[-1]["eval/margin"] > 0
    columns = list((folder / "runs/cache/dpo/preference_pairs").rglob("reference_log_probs-*/manifest.json"))
    assert len(columns) == 2
