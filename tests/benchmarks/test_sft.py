"""The benchmark of SFT: its conversations are the same for both sides, and its own side trains on them."""

import io
import json
import os
import subprocess
import sys


def test_conversations_are_mixed_and_half_of_them_carries_loss(tool, root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    made = tool("sft").make_conversations(500, 512, 2000)
    assert made == tool("sft").make_conversations(500, 512, 2000)
    lengths = [len(ids) for ids, _ in made]
    assert max(lengths) <= 512 and min(lengths) == 16 and 64 < sum(lengths) / len(lengths) < 128
    share = sum(sum(weights) for _, weights in made) / sum(lengths)
    assert 0.4 < share < 0.7 and all(weights[0] == 0 for _, weights in made)


def test_our_side_counts_the_targets_of_each_update(tool, root, monkeypatch, tmp_path):
    from qwen_jax.models.config import ModelConfig

    monkeypatch.syspath_prepend(root / "benchmarks")
    sft, config = (
        tool("sft"),
        ModelConfig(
            vocab_size=61, hidden_size=32, num_layers=1, num_heads=2, head_dim=16, ffn_size=48, context_length=64
        ),
    )
    folder = tool("random_weights").write_model(config, tmp_path, spread=0.02)
    conversations = sft.make_conversations(61, 64, 30)
    (tmp_path / "data.json").write_text(json.dumps(conversations))
    read, write = os.pipe()
    job = {"folder": str(folder), "data": str(tmp_path / "data.json"), "length": 64, "rows": 16, "at_once": 8}
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    sft.our_side({**job, "remat": "none", "answers": write})
    with os.fdopen(read) as answers:
        set_up, answer = (json.loads(answers.readline()) for _ in range(2))
    assert set_up["carrying"] == sum(sum(weights) for _, weights in conversations)
    assert len(answer["losses"]) == 2 and 0 < sum(answer["targets"]) <= 2 * 16 * 64 and answer["cpu"] > 0


def test_a_missing_peer_is_named(root, plain_environment):
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "sft.py"],
        env=plain_environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "name the interpreter of an environment with trl: --peer_python" in done.stderr
