"""Benchmarks as SeqIO tasks: an oracle gets 100%, its opposite 0%, and nothing is lost on the way."""

import csv

import gin
import pytest
import seqio

import tasks  # noqa: F401
from qwen_jax.evaluation.benchmark import Choices, Example
from qwen_jax.evaluation.benchmark_tasks import benchmarks, evaluate, read_examples


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("dev", 5), ("test", 3)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "world_history"):
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as file:
                lines = [
                    [f"{subject} {n}, which?", "one", "two", "three, or 3", "four", "ABCD"[n % 4]] for n in range(rows)
                ]
                csv.writer(file).writerows(lines)
    gin.bind_parameter("benchmark_files.data_dir", str(folder))
    yield folder
    gin.clear_config()


def test_scores_go_through_the_evaluator_of_seqio(data_dir):
    examples = list(read_examples(benchmarks()["mmlu"], data_dir))
    assert [len(examples), len({example.id for example in examples})] == [6, 6]
    right = [
        {"output": {"log_likelihoods": [float(i == e.target) for i in range(4)], "tokens": [1] * 4}} for e in examples
    ]
    wrong = [
        {"output": {"log_likelihoods": [-float(i == e.target) for i in range(4)], "tokens": [1] * 4}} for e in examples
    ]
    found = evaluate("mmlu", right)
    assert found["score"] == found["subject/anatomy"] == 100 and found["examples"] == 6
    assert evaluate("mmlu", wrong)["score"] == 0
    half = evaluate("mmlu", right[:3] + wrong[3:])
    assert half["score"] == 50 and half["score_stderr"] == pytest.approx(100 * (0.3 / 6) ** 0.5)
    with pytest.raises(ValueError, match="5 predictions for 6 examples"):
        evaluate("mmlu", right[:5])


def test_a_task_of_seqio_gives_the_prompts(data_dir):
    rows = list(seqio.get_mixture_or_task("mmlu").get_dataset(None, "test", shuffle=False).as_numpy_iterator())
    example = Example.from_json(rows[0]["targets"][0])
    assert rows[0]["inputs"][0].decode() == example.prompt
    assert example.prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nQ")
    assert example.prompt.endswith("\nD. four\nAnswer:") and example.choices == (" A", " B", " C", " D")


@pytest.mark.parametrize(("normalization", "answer"), [("sum", 0), ("tokens", 1), ("characters", 1), ("bytes", 2)])
def test_normalization_decides_between_choices(normalization, answer):
    output = {"log_likelihoods": [-2.0, -4.0, -3.0], "tokens": [1, 4, 2]}
    assert Choices(normalization=normalization).answer(output, [" a", " bbbb", " \u00e9\u00e9"]) == answer
