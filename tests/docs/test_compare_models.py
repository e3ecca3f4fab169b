"""Runs the commands of docs/how_to/compare_models.md, in order, on random models in place of the trained ones."""

import json

from tests.fakes import random_run
from tests.pages import ROOT, blocks, shell


def test_commands_of_the_page(tmp_path):
    for name, run, spread in (("demo", "run", 0.25), ("sft", "full", 0.5)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        made = random_run(
            tmp_path / "runs" / name,
            spread=spread,
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            ffn_size=48,
            context_length=256,
        )
        made.rename(made.with_name(run))
    questions = [{"messages": [{"role": "user", "content": f"Repeat: {word}"}]} for word in "ab"]
    (tmp_path / "runs" / "sft" / "held_out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    shown, expected = [], []
    for kind, text in blocks("compare_models.md"):
        if kind == "sh":
            shown.append(shell(text, tmp_path, ROOT).stdout)
        else:
            expected += text.splitlines()
    answers = [json.loads(line) for line in (tmp_path / "runs/compare/answers.jsonl").read_text().splitlines()]
    assert [(one["instruction"], one["model"]) for one in answers] == [
        ("1", "base"), ("2", "base"), ("1", "sft"), ("2", "sft"),
    ]  # fmt: skip
    assert "2 (100.0%)" not in shown[0] and "| base | 2 | 0 (0.0%) |" in shown[0]
    assert "not shown, since both answers are the same text" in shown[1] or "with 2 comparisons" in shown[1]
    assert expected and all(line in shown[-1] for line in expected)
    ranking = (tmp_path / "runs/compare/ranking/ranking.md").read_text()
    assert ranking in shown[-1] and "| ann, bob |" in ranking
    assert (tmp_path / "runs/compare/ranking/ranking.png").read_bytes().startswith(b"\x89PNG")
