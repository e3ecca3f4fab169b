"""The review page: what it holds, and a real browser in which somebody decides."""

import json
import re

import pytest

from qwen_jax.agents.self_instruct import keep_accepted
from qwen_jax.evaluation.review_page import make_page
from tests.browser import browser

HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'> <b>bold</b> & \u2028 你好"


def sample(name):
    call = {"name": "weather", "arguments": json.dumps({"city": HOSTILE})}
    messages = [
        {"role": "user", "content": f"{name} {HOSTILE}"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "tool", "content": HOSTILE},
        {"role": "assistant", "content": "Sun."},
    ]
    return {"id": name, "tools": [{"name": "weather", "description": HOSTILE, "parameters": {}}], "messages": messages}


SAMPLES = [sample(name) for name in ("0-1", "0-4", "0-9")]


def test_samples_cannot_leave_the_data():
    html = make_page(SAMPLES)
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    items = json.loads(text)["items"]
    assert [item["id"] for item in items] == ["0-1", "0-4", "0-9"] and "<" not in text
    assert items[0]["messages"][0]["content"] == f"0-1 {HOSTILE}" and "weather" in items[0]["messages"][1]["content"]
    assert html.count("<script") == 2


def test_samples_without_an_id_of_their_own_are_refused():
    with pytest.raises(ValueError, match="there is no sample"):
        make_page([])
    with pytest.raises(ValueError, match="one has none"):
        make_page([{**SAMPLES[0], "id": None}])
    with pytest.raises(ValueError, match="0-1 is there twice"):
        make_page([SAMPLES[0], SAMPLES[0]])


def test_a_person_decides_by_keys_and_the_decisions_are_read(tmp_path):
    (tmp_path / "page.html").write_text(make_page(SAMPLES), encoding="utf-8")
    with browser(tmp_path / "profile", tmp_path) as page:
        page.open(f"file://{tmp_path}/page.html")
        page.evaluate("document.getElementById('name').value = 'Mei 美'")
        page.evaluate("document.querySelector('#start button').click()")
        assert page.evaluate("document.querySelector('#messages .text').textContent") == f"0-1 {HOSTILE}"
        page.evaluate("document.getElementById('note').value = 'fine'")
        page.press("a")
        page.press("u")
        page.press("Backspace")
        page.press("r")
        page.press("1")
        assert page.evaluate("document.getElementById('count').textContent") == "3 of 3"
        assert not page.evaluate("document.getElementById('done').hidden")
        lines = page.evaluate("lines()")
        assert page.evaluate("window.stolen === undefined")
        # Decisions stay in the browser.
        page.open(f"file://{tmp_path}/page.html")
        page.evaluate("begin('Mei 美')")
        assert page.evaluate("lines()") == lines and page.problems == []
    decisions = [json.loads(line) for line in lines.splitlines()]
    assert decisions[0] == {"id": "0-1", "decision": "accept", "reviewer": "Mei 美", "note": "fine"}
    kept, counts = keep_accepted(SAMPLES, decisions)
    assert [one["id"] for one in kept] == ["0-1", "0-9"] and counts == {"accept": 2, "reject": 1}
