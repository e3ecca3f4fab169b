r"""Answers compared as mathematics: agreement with hand-made labels, order and brackets, Chinese, threads, time limits.

`mathematics_pairs.jsonl` holds a prediction, a gold answer and whether a person takes one for the other. The rules were
written with the first set in sight; the second set was written afterwards.
"""

import concurrent.futures
import json
import threading
from pathlib import Path

import pytest

from qwen_jax.evaluation import extraction, mathematics
from qwen_jax.evaluation.comparison_processes import ComparisonProcesses

pytest.importorskip("math_verify", reason="needs the extra `evaluation`")
PAIRS = [json.loads(line) for line in Path(__file__).with_name("mathematics_pairs.jsonl").read_text().splitlines()]
# Of the second set; each is right, and taken for wrong. docs/reference/mathematics.md says why.
KNOWN = {"72 (seventy-two)", r"(-\infty, 2) \cup (2, \infty)", "x = 1, y = 2", "2 dozen", "500 g", r"\textbf{(C)}\ 12"}
KNOWN |= {"八", "0.8米"}


def test_verdicts_agree_with_a_person():
    assert len(PAIRS) >= 350 and len({pair["kind"] for pair in PAIRS}) >= 20
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: mathematics.same(pair["prediction"], pair["gold"]), PAIRS))
    others = [pair for pair, verdict in zip(PAIRS, found, strict=True) if verdict != pair["right"]]
    assert {pair["prediction"] for pair in others} == KNOWN
    assert all(pair["set"] == "second" and pair["right"] for pair in others)
    page = (Path(__file__).parents[2] / "docs" / "reference" / "mathematics.md").read_text()
    assert f"{len(PAIRS) - len(others)} of {len(PAIRS)}" in page


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        ("(1,2,3)", r"\{1,2,3\}", False),
        ("(1,3)", "3,1", False),
        ("(1,3)", "(1, 3)", True),
        ("(1,3)", "(3,1)", False),
        ("[1,3)", "(1,3)", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("[1,2]", r"\lbrack 1,2\rbrack", True),
        (r"\{1,2\}", r"\lbrack 1,2\rbrack", False),
        ("3,1", "1,3", True),
    ],
)
def test_order_and_brackets_count_where_the_gold_answer_has_them(gold, prediction, right):
    assert mathematics.same(prediction, gold) is right


@pytest.mark.parametrize("text", ["答案是8。", "答案：8", "共有8个。", r"\boxed{8个}", r"\boxed{８}"])
def test_chinese_answers_are_read(text):
    assert mathematics.same(extraction.mathematical(text), "8")
    assert not mathematics.same(extraction.mathematical(text), "9")


def test_a_comparison_that_takes_too_long_is_wrong_and_the_next_one_works(caplog):
    processes = ComparisonProcesses(1)
    try:
        assert not processes.same("(700000)!", "3", 0.2)  # it takes seconds
        assert "'(700000)!' is taken for wrong: comparing it with '3' took over 0.2 s" in caplog.text
        assert processes.same(r"\sqrt{8}", r"2\sqrt{2}", 20.0)
    finally:
        processes.close()


def test_a_process_that_was_killed_is_replaced():
    processes = ComparisonProcesses(1)
    try:
        assert processes.same("x+1", "1+x", 20.0)
        (worker,) = processes._idle.queue
        worker._process.kill()
        worker._process.wait()
        assert processes.same("x+1", "1+x", 20.0)
    finally:
        processes.close()


def test_no_signal_is_used_so_that_any_thread_may_compare(monkeypatch):
    monkeypatch.setattr("signal.alarm", None)
    monkeypatch.setattr("signal.signal", None)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(mathematics.same(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"))
    )
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    "prediction", ["", "x" * 2000, r"\frac{", "}{", "((((", r"\begin{pmatrix}1", "=", ",", r"\{", "\n", "$$"]
)
def test_what_is_no_answer_is_wrong(prediction):
    assert not mathematics.same(prediction, "12")
    assert not mathematics.same(prediction, "(1,2)")


def test_nothing_is_compared_where_the_text_decides(monkeypatch):
    monkeypatch.setattr(ComparisonProcesses, "same", None)
    assert mathematics.same("$1,234.00", "1234") and mathematics.same("1/2", "0.5")
    assert not mathematics.same("Tuesday", "Monday") and not mathematics.same("17", "18")


def test_brackets_within_brackets_are_no_answer():
    assert mathematics.same(r"\{" * 3 + "1" + r"\}" * 3, "1")
    assert not mathematics.same(r"\{" * 240 + "1" + r"\}" * 240, "5")
