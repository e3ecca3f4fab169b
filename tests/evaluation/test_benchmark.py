"""Benchmarks as SeqIO tasks: an oracle gets 100%, its opposite 0%, and nothing is lost on the way."""

import csv
import dataclasses

import gin
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, Outcome, judged, scores
from qwen_jax.evaluation.benchmark_tasks import benchmarks, evaluate, python_values, read_examples


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


def test_whole_texts_are_compared_by_the_mean_of_a_token():
    choices = Choices(normalization="text")
    example = Example(id="0", prompt="Q\nA: ", choices=("yes", "oh no"), target=1)
    assert choices.pairs(example) == [("", "Q\nA: yes"), ("", "Q\nA: oh no")]
    assert Choices().pairs(example) == [("Q\nA: ", "yes"), ("Q\nA: ", "oh no")]
    assert choices.answer({"log_likelihoods": [-8.0, -9.0], "tokens": [4, 5]}, example.choices) == 1


MIXED = Benchmark(
    name="mixed",
    title="Mixed",
    folder="mixed",
    files="",
    shots=0,
    read=lambda folder: iter(()),
    answers=Choices(),
    written=Generation(
        max_new_tokens=8,
        extract={"choice": lambda text, example: text.strip() or None},
        chat_extract={"choice": lambda text, example: "ab".find(text[-1:])},
        judge=lambda found, example: found == example.target,
    ),
)


def test_an_example_without_choices_is_written_and_a_chat_model_writes_its_choice():
    ranked = Example(id="0", prompt="Q", choices=(" a", " b"), target=1, chat="Q? a or b")
    written, unasked = Example(id="1", prompt="Q", target="AB"), dataclasses.replace(ranked, chat="")
    kinds = [[MIXED.answered_by(one, chat) is MIXED.written for one in (ranked, written, unasked)] for chat in (0, 1)]
    assert kinds == [[False, True, False], [True, True, False]]
    assert judged(MIXED, ranked, {"log_likelihoods": [0, 1], "tokens": [1, 1]}).score == {"choice": 1}
    assert judged(MIXED, ranked, "it is b", chat=True).score == {"choice": 1}
    assert judged(MIXED, written, "AB").extracted == {"choice": "AB"}
    assert judged(MIXED, written, "").score == {"choice": 0}
    with pytest.raises(ValueError, match="mixed: example 1 has no choices, and the benchmark has no `written`"):
        dataclasses.replace(MIXED, written=None).answered_by(written)


def test_a_benchmark_that_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="mixed: the first way of extraction of `written` must be named 'choice'"):
        dataclasses.replace(MIXED, written=dataclasses.replace(MIXED.written, extract={"letter": str}))
    with pytest.raises(ValueError, match="mixed: average is 'macro', expected one of examples, subjects"):
        dataclasses.replace(MIXED, average="macro")


def test_points_and_subjects_weigh_the_average():
    outcomes = [
        Outcome(id=str(n), subject=subject, extracted={"choice": n}, score={"choice": score}, weight=weight)
        for n, (subject, score, weight) in enumerate((("a", 1, 6), ("a", 0, 2), ("b", 0.5, 2), ("b", 0, 2)))
    ]
    found = scores(dataclasses.replace(MIXED, groups={"first": ["a"]}), outcomes)
    assert found["score"] == pytest.approx(100 * 7 / 12)
    assert (found["group/first"], found["subject/b"]) == (75, 25)
    by_subject = scores(dataclasses.replace(MIXED, average="subjects"), outcomes)
    assert by_subject["score"] == 50
    # With equal weights the standard error is the usual one.
    plain = [dataclasses.replace(outcome, weight=3.0) for outcome in outcomes]
    values = [outcome.score["choice"] for outcome in plain]
    assert scores(MIXED, plain)["score_stderr"] == pytest.approx(100 * np.std(values, ddof=1) / 2)


def test_values_of_tfds_become_those_of_python():
    row = {
        "text": b"\xe4\xb8\xad",
        "label": np.int64(1),
        "list": {"text": np.array([b"a", b"b"], object)},
        "yes": np.True_,
    }
    assert python_values(row) == {"text": "中", "label": 1, "list": {"text": ["a", "b"]}, "yes": True}
