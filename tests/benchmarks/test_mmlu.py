"""benchmarks/mmlu.py: both sides get the same requests, and their answers are compared."""

import sys

import pytest

from tests.evaluation.published import FILES


@pytest.fixture
def mmlu(tool, root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return tool("mmlu")


def test_requests_are_the_prompts_of_the_benchmark_with_each_letter(mmlu, tmp_path):
    (tmp_path / "mmlu").mkdir()
    FILES["mmlu"].write(tmp_path / "mmlu")
    found = mmlu.read_requests(tmp_path, None)
    rows = [row for of_subject in found.values() for row in of_subject]
    assert len(rows) == 4 * FILES["mmlu"].examples
    assert len({prompt for prompt, _ in rows[:4]}) == 1 and rows[0][0].endswith("Answer:")
    assert [choice for _, choice in rows[:4]] == [" A", " B", " C", " D"]
    one = next(iter(found))
    assert mmlu.read_requests(tmp_path, [one]) == {one: found[one]}


def test_a_side_answers_subject_after_subject_and_adds_up_its_seconds(mmlu, tmp_path, capsys):
    (tmp_path / "lm_eval" / "api").mkdir(parents=True)  # the peer's class of requests, where it is not installed
    (tmp_path / "lm_eval" / "api" / "instance.py").write_text(
        "class Instance:\n    def __init__(self, kind, document, args, index): self.args = args\n"
    )
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
class Lengths:
    def loglikelihood(self, requests, disable_tqdm): return [(-float(len(one.args[1])), False) for one in requests]
def model(folder, batch):
    print("a line of the library")
    return Lengths()
"""
    sides = {"qwen_jax": mmlu.Side(sys.executable, program, tmp_path, 1)}
    sides["peer"] = mmlu.Side(sys.executable, program, tmp_path, 1, every=2)
    one = [("Q", " A"), ("Q", "B"), ("Q", " C"), ("Q", " D")]
    subjects = {"one": one, "two": [*one[::-1], *one, *[("Q", " A")] * 3, ("Q", "D")]}
    mmlu.answer_in_turns(subjects, sides)
    assert sides["qwen_jax"].totals == [-2, -1, -2, -2, -2, -2, -1, -2, -2, -1, -2, -2, -2, -2, -2, -1]
    assert sides["peer"].totals == [-2, -1, -2, -2, -2, -2, -1, -2, -2, -2, -2, -1]
    assert mmlu.answers(sides["peer"].totals) == [1, 2, 3]
    mmlu.show(sides, subjects)
    shown = capsys.readouterr().out
    assert "4 questions" in shown
    assert "equal answers 3 of 3; largest difference of log-likelihoods 0.0e+00" in shown


def test_the_most_likely_choice_is_the_answer(mmlu):
    assert mmlu.answers([-3.0, -1.0, -2.0, -4.0, -1.0, -1.0, -5.0, -0.5]) == [1, 3]
