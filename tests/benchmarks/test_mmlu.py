"""benchmarks/mmlu.py: both sides get the same requests, and their answers are compared."""

import json

import pytest

from tests.evaluation.published import FILES


@pytest.fixture
def mmlu(tool, root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return tool("mmlu")


def test_requests_are_the_prompts_of_the_benchmark_with_each_letter(mmlu, tmp_path):
    (tmp_path / "mmlu").mkdir()
    FILES["mmlu"].write(tmp_path / "mmlu")
    assert mmlu.write_requests(tmp_path, None, tmp_path / "requests") == FILES["mmlu"].examples
    rows = [json.loads(line) for line in open(tmp_path / "requests")]
    assert len(rows) == 4 * FILES["mmlu"].examples
    assert len({prompt for prompt, _ in rows[:4]}) == 1 and rows[0][0].endswith("Answer:")
    assert [choice for _, choice in rows[:4]] == [" A", " B", " C", " D"]


def test_the_most_likely_choice_is_the_answer(mmlu):
    assert mmlu.answers([-3.0, -1.0, -2.0, -4.0, -1.0, -1.0, -5.0, -0.5]) == [1, 3]
