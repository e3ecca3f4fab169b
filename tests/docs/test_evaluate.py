"""Runs the commands of docs/how_to/evaluate.md, in order, on a random model in place of the demo's."""

import json
import shlex

from qwen_jax import evaluate
from tests.fakes import random_run
from tests.pages import blocks, shell


def test_commands_of_the_page(tmp_path, tool, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=1024)
    random_run(tmp_path / "runs" / "demo", **sizes)
    # Programs in this process: each would import TensorFlow anew.
    mains = {
        ("python", "-m", "qwen_jax.evaluate"): evaluate.main,
        ("python", "tools/measure_perplexity.py"): tool("measure_perplexity").main,
    }
    shown = []
    for kind, text in blocks("evaluate.md"):
        assert kind == "sh"
        lines = [line for line in text.splitlines() if not line.startswith("python ")]
        if lines:
            shell("\n".join(lines), tmp_path)
        for line in text.splitlines():
            for start, main in mains.items():
                words = tuple(shlex.split(line)) if line.startswith("python ") else ()
                if words[: len(start)] == start:
                    main(list(words[len(start) :]))
                    shown.append(capsys.readouterr().out)
    listed, scores, perplexity = shown
    assert "mmlu/: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv" in listed
    assert "| Qwen-7B (report) | 58.2 |" in scores and "3 of 14,042" in scores
    results = json.loads((tmp_path / "runs/demo/scores/results.json").read_text())["benchmarks"]["mmlu"]
    assert results["examples"] == 3 and results["prompts_cut"] == 0
    answers = [json.loads(line) for line in (tmp_path / "runs/demo/scores/mmlu/answers.jsonl").read_text().splitlines()]
    assert {(one["id"], one["target"]) for one in answers} == {("anatomy/0", 0), ("anatomy/1", 2), ("anatomy/2", 0)}
    assert "| en | books | 1 | 58 |" in perplexity and "| c | code | 1 | 24 |" in perplexity
    assert (tmp_path / "runs/perplexity/perplexity.md").read_text().strip() == perplexity.strip()
