"""Runs the commands of docs/how_to/rlhf.md, in order, in a copy of the repository, with shorter runs."""

import json
import re

import pytest

from tests.pages import blocks, copy_repository, shell

# A reader's runs take minutes; these show that every command does what the page says.
SHORT = (
    (r"(--output=runs/rlhf/data)\b", r"\1 --rows=300"),
    (r"(toy_(?:base|sft|reward)\.gin.*)", r"\1 --gin.TRAIN_STEPS=6 --gin.WARMUP_STEPS=2"),
    (r"(ppo_tiny\.gin.*)", r"\1 --gin.TRAIN_STEPS=8 --gin.POLICY_START_STEP=4 --gin.CHECKPOINT_EVERY=4"),
    (r"(grpo_tiny\.gin.*)", r"\1 --gin.TRAIN_STEPS=4 --gin.CHECKPOINT_EVERY=4"),
)


def shortened(text: str) -> str:
    for pattern, replacement in SHORT:
        text = re.sub(pattern, replacement, text)
    return text


def rows(folder, name):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if name in row]


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    texts = [text for kind, text in blocks("rlhf.md") if kind == "sh"]
    assert len(texts) == 3
    for text in texts:
        shell(shortened(text), tmp_path)
    ppo, grpo = tmp_path / "runs/rlhf/ppo", tmp_path / "runs/rlhf/grpo"
    page = (tmp_path / "docs/how_to/rlhf.md").read_text()
    first = rows(ppo, "rollout/reward")[0]
    for name in re.findall(r"`(rollout/[a-z_]+|eval/[a-z_]+|[a-z]+_[a-z]+)`", page):
        assert any(name in row for row in rows(ppo, "step")), name
    assert first["rollout/mismatch"] <= 1.01 and "rollout/watched/gold" in first
    assert rows(grpo, "rollout/groups_without_signal")
    assert (ppo / "rollouts/00000004.jsonl").stat().st_size > 100
    shell(
        "python tools/ablate_rlhf.py --output=runs/rlhf/ablation --seeds=2 --steps=8 --variants recipe no_kl "
        "--set CHECKPOINT_EVERY=4 --set POLICY_START_STEP=4",
        tmp_path,
    )
    table = (tmp_path / "runs/rlhf/ablation/table.md").read_text()
    assert re.search(r"\| the KL term \| -?\d+\.\d\d \(", table) and "*before PPO*" in table
    assert (tmp_path / "runs/rlhf/ablation/curves.png").stat().st_size > 10_000
