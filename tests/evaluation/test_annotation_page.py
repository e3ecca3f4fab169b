"""The annotation page: what it holds, and a real browser in which somebody judges."""

import json
import re

import pytest

from qwen_jax.evaluation.annotation_page import Answer, make_page, read_answers
from qwen_jax.evaluation.preferences import read_comparisons
from tests.browser import browser

HOSTILE = (
    "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'> <b>bold</b> & \u2028 ]]> 你好"
)


def answers(instructions=3, models=("base", "sft")) -> list[Answer]:
    return [
        Answer(str(index), model, (("user", f"question {index} {HOSTILE}"),), f"{model} says {index} {HOSTILE}")
        for index in range(instructions)
        for model in models
    ]


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_every_pair_is_there_once_and_sides_are_random():
    page = make_page(answers(40, ("a", "b", "c")), seed=1)
    items = data_of(page.html)["items"]
    assert page.items == len(items) == 120 and not page.left_out and not page.ties
    pairs = {(one["instruction"], *sorted((one["left"]["model"], one["right"]["model"]))) for one in items}
    assert len(pairs) == 120
    lefts = [one["left"]["model"] for one in items if {one["left"]["model"], one["right"]["model"]} == {"a", "b"}]
    assert 10 < lefts.count("a") < 30
    order = [one["instruction"] for one in items]
    assert order != sorted(order, key=int)
    assert make_page(answers(40, ("a", "b", "c")), seed=1).html == page.html
    assert make_page(answers(40, ("a", "b", "c")), seed=2).html != page.html
    against = data_of(make_page(answers(5, ("a", "b", "c")), reference="a").html)["items"]
    assert len(against) == 10 and all("a" in (one["left"]["model"], one["right"]["model"]) for one in against)


def test_answers_cannot_leave_the_data_and_equal_ones_are_ties():
    same = [Answer("9", model, (("user", "q"),), "the same") for model in ("base", "sft")]
    page = make_page([*answers(), *same, Answer("10", "sft", (("user", "q"),), "alone")])
    assert (page.ties, page.left_out) == (1, ["10"])
    content = data_of(page.html)
    assert content["items"][0]["left"]["answer"].endswith(HOSTILE) and len(content["ties"]) == 1
    body = page.html.split('id="data">')[1]
    assert page.html.count("<script") == 2 and "<" not in body.split("</script>")[0]
    with pytest.raises(ValueError, match="nothing to compare: .* models: base, sft"):
        make_page(same)


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


RECORD = {"instruction": 1, "model": "sft", "messages": [{"role": "user", "content": "q"}], "answer": ""}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([[]], "answers.jsonl:1: expected an object, found list"),
        ([{**RECORD, "answer": None}], "answer must be text, found None"),
        ([{**RECORD, "messages": [{"role": "user"}]}], "messages must be a list of objects with a text role"),
        ([RECORD, RECORD], r"answers.jsonl:2: sft answers instruction 1 already in .*answers.jsonl:1"),
        ([RECORD, {**RECORD, "model": "x", "messages": []}], "instruction 1 is another conversation than before"),
    ],
)
def test_wrong_answers_are_named_with_their_line(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        read_answers([write(tmp_path / "answers.jsonl", *records)])
    assert read_answers([write(tmp_path / "answers.jsonl", RECORD)])[0].answer == ""


def test_somebody_judges_in_a_browser(tmp_path):
    """Keys and buttons, back, a closed page that goes on where it was, the downloaded file, and answers as text."""
    same = [Answer("9", model, (("user", "q"),), "the same") for model in ("base", "sft")]
    page = make_page([*answers(), *same])
    (tmp_path / "page.html").write_text(page.html, encoding="utf-8")
    url, items = (tmp_path / "page.html").as_uri(), data_of(page.html)["items"]
    with browser(tmp_path / "profile", tmp_path / "downloads") as view:
        view.open(url)
        begin = "document.getElementById('name').value = 'Ann Ü'; document.querySelector('#start button').click()"
        view.evaluate(begin)
        for side in ("left", "right"):
            shown = view.evaluate(f"document.getElementById('{side}').textContent")
            assert shown == items[0][side]["answer"]
        assert HOSTILE in view.evaluate("document.getElementById('prompt').textContent")
        assert view.evaluate("document.querySelectorAll('#work img, #work b, #work script').length") == 0
        assert "base" not in view.evaluate("document.body.innerText.replace(/base says/g, '')")
        view.press("1")
        view.press("ArrowRight")
        view.press("Backspace")  # the second again
        view.press("ArrowDown")
        assert view.evaluate("document.getElementById('count').textContent") == "2 of 3"
        # Closed and opened again: the verdicts are still there.
        view.open(url)
        view.evaluate(begin)
        assert view.evaluate("document.getElementById('count').textContent") == "2 of 3"
        assert view.evaluate("document.getElementById('left').textContent") == items[2]["left"]["answer"]
        view.evaluate("document.getElementById('choose-right').click()")
        assert view.evaluate("document.getElementById('done').hidden") is False
        view.evaluate("document.getElementById('download').click()")
        view.wait_for("Browser.downloadProgress", state="completed")
        assert view.evaluate("window.stolen === undefined") is True
        assert view.problems == []
    (file,) = (tmp_path / "downloads").iterdir()
    assert file.name == "verdicts_Ann_Ü.jsonl"
    found = read_comparisons([file])
    assert [one.winner for one in found] == ["left", "tie", "right", "tie"]
    assert [(one.instruction, one.left, one.right) for one in found[:3]] == [
        (item["instruction"], item["left"]["model"], item["right"]["model"]) for item in items
    ]
    assert {one.annotator for one in found} == {"Ann Ü"} and found[3].instruction == "9"
