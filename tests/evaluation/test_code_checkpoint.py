"""From a checkpoint to verdicts on its programs: a random model on a file in HumanEval's layout, and the score 0."""

import json

import pytest

from qwen_jax import evaluate as command
from qwen_jax import sandbox
from tests.fakes import random_run

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=128)


def row(name, operation):
    return {
        "task_id": f"HumanEval/{name}",
        "entry_point": name,
        "prompt": f'def {name}(a: int, b: int) -> int:\n    """The {name} of two numbers."""\n',
        "canonical_solution": f"    return a {operation} b\n",
        "test": f"def check(candidate):\n    assert candidate(7, 5) == 7 {operation} 5\n",
    }


def test_a_checkpoint_writes_programs_that_are_run_and_scored(tmp_path):
    if sandbox.run("print(1)").stdout != "1\n":
        pytest.skip("programs cannot be isolated on this system")
    rows = [row("sum_of", "+"), row("product_of", "*")]
    (tmp_path / "data" / "humaneval").mkdir(parents=True)
    (tmp_path / "data" / "humaneval" / "HumanEval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    checkpoint = random_run(tmp_path, **SIZES)
    found = command.evaluate(
        checkpoint=checkpoint,
        benchmarks=["humaneval"],
        data_dir=tmp_path / "data",
        output_dir=tmp_path / "scores",
        name="code",
    )
    assert found["humaneval"].examples == 2 and found["humaneval"].metrics["score"] == 0
    answers = [json.loads(line) for line in (tmp_path / "scores/humaneval/answers.jsonl").read_text().splitlines()]
    assert {one["id"] for one in answers} == {one["task_id"] for one in rows}
    assert all(one["prompt"].startswith("def ") and one["output"] for one in answers)
    page = (tmp_path / "scores" / "results.md").read_text()
    assert "Code-Qwen-7B" in page and "40.2" in page
