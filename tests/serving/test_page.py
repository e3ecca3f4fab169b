"""The chat page in a browser: a conversation, a stop, a call of a tool, an error; at two widths."""

import contextlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_jax.data.images import open_image, squash
from tests.browser import browser, find_chromium
from tests.fakes import SMALL_VISION
from tests.serving.scripted import ScriptedEngine, serving
from tests.serving.test_limits import Call, until

REPLY = "Hello <b>you</b> & 你好 👩‍🚀\nbye"
CALL = 'Thought: I look.\nAction: weather\nAction Input: {"city": "Paris"}'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


class Script:
    """An engine, and what it says next."""

    def __init__(self, tokenizer):
        self.engine = ScriptedEngine(tokenizer, lambda prompt: self.says)
        self.says = REPLY


@pytest.fixture(scope="module")
def script(tokenizer):
    return Script(tokenizer)


@pytest.fixture(scope="module")
def running(script):
    with serving(script.engine) as running:
        yield running


@pytest.fixture(scope="module")
def page(running, tmp_path_factory):
    find_chromium()
    folder = tmp_path_factory.mktemp("chromium")
    with browser(folder / "profile", folder / "downloads") as page:
        yield page


def resize(page, width, height=800):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)


def fill(page, name, text):
    page.evaluate(f"document.getElementById({name!r}).value = {json.dumps(text)}")


def send(page, text):
    """Types a message and sends it by the Enter key."""
    page.evaluate("document.getElementById('message').focus()")
    page.call("Input.insertText", text=text)
    page.press("Enter")


def idle(page):
    until(lambda: page.evaluate("document.getElementById('stop').hidden"))


def turns(page):
    return page.evaluate(
        "[...document.querySelectorAll('.turn')].map(one => [one.className, one.children[0].innerText])"
    )


@pytest.mark.parametrize("width", [360, 1200])
def test_a_conversation(page, running, script, width):
    page.problems.clear()
    resize(page, width)
    page.open(running.url + "/")
    until(lambda: page.evaluate("document.getElementById('model').textContent") == "tiny")
    script.says = REPLY
    page.evaluate("document.getElementById('settings').open = true")
    fill(page, "system", "Be brief.")
    fill(page, "temperature", "0.5")
    fill(page, "max_tokens", "100")
    send(page, "One <i>question</i>")
    idle(page)
    send(page, "Another")
    idle(page)
    assert turns(page) == [
        ["turn user", "One <i>question</i>"],
        ["turn assistant", REPLY],
        ["turn user", "Another"],
        ["turn assistant", REPLY],
    ]
    request = script.engine.requests[-1]
    assert script.engine.prompts[-1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne <i>")
    assert (request.sampling.temperature, request.max_new_tokens) == (0.5, 100)
    assert "tokens in" in page.evaluate("document.querySelector('.note').textContent")
    fits = "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
    assert page.evaluate(fits) and page.problems == []


@contextlib.contextmanager
def a_long_reply(page, running, script):
    """Within, a reply has begun and comes no further; the block ends it. Afterwards its row is free."""
    page.open(running.url + "/")
    script.says = "word " * 200
    steps = threading.Semaphore(5)
    step = script.engine.step
    script.engine.step = lambda: step() if steps.acquire(timeout=300) else []
    try:
        send(page, "Talk")
        until(lambda: page.evaluate("document.querySelector('.assistant .text')?.textContent ?? ''").startswith("word"))
        yield
        idle(page)
        steps.release()
        until(lambda: running.service.thread.open == 0)
    finally:
        script.engine.step = step
        steps.release()


def test_stop_keeps_what_was_said_and_frees_the_row(page, running, script):
    with a_long_reply(page, running, script):
        assert page.evaluate("document.getElementById('send').hidden")
        page.evaluate("document.getElementById('stop').click()")
    assert "stopped" in page.evaluate("document.querySelector('.note').textContent")
    script.says = REPLY
    send(page, "Again")
    idle(page)
    assert "assistant\nword " in script.engine.prompts[-1] and turns(page)[-1] == ["turn assistant", REPLY]


def test_a_reply_that_is_left_for_a_new_conversation_is_no_part_of_it(page, running, script):
    with a_long_reply(page, running, script):
        page.evaluate("document.getElementById('new').click()")
    assert page.evaluate("messages") == [] == turns(page)
    script.says = REPLY
    send(page, "Other")
    idle(page)
    assert "word" not in script.engine.prompts[-1] and "Talk" not in script.engine.prompts[-1]
    assert turns(page) == [["turn user", "Other"], ["turn assistant", REPLY]]


def test_a_call_is_shown_and_a_person_gives_its_result(page, running, script):
    page.problems.clear()
    page.open(running.url + "/")
    fill(page, "tools", json.dumps(TOOLS))
    script.says = CALL
    send(page, "Weather?")
    idle(page)
    assert page.evaluate("document.querySelector('.call code').textContent") == 'weather({"city": "Paris"})'
    script.says = " I know.\nFinal Answer: Rain."
    page.evaluate("document.activeElement.value = '9 degrees'")
    page.evaluate("document.querySelector('.call button').click()")
    until(lambda: len(turns(page)) == 4)
    idle(page)
    assert turns(page)[2:] == [["turn tool", "9 degrees"], ["turn assistant", "Rain."]]
    assert script.engine.prompts[-1].endswith("Observation: 9 degrees\nThought:") and page.problems == []


def test_an_error_is_told(page, running):
    page.open(running.url + "/")
    fill(page, "max_tokens", "100000")
    send(page, "Hi")
    idle(page)
    assert "4096 tokens" in page.evaluate("document.querySelector('.wrong').textContent")
    assert page.evaluate("document.getElementById('message').value") == "Hi" and page.evaluate("messages.length") == 0
    fill(page, "tools", "{")
    send(page, "")
    until(lambda: len(turns(page)) == 4)
    idle(page)
    assert "no JSON" in page.evaluate("[...document.querySelectorAll('.wrong')].pop().textContent")


def test_the_page_asks_for_a_key_and_needs_no_other_server(tokenizer, running):
    with serving(ScriptedEngine(tokenizer, lambda prompt: ""), api_key="key") as guarded:
        status, headers, text = Call(guarded.url, None, "/", "GET").answer()
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    for name in ("chat.css", "chat.js", "pictures.js"):
        assert f"/page/{name}" in text
        status, headers, text_of_it = Call(running.url, None, f"/page/{name}", "GET").answer()
        assert status == 200 and "http" not in text_of_it.replace("http-", "")
    for name in ("../app.py", "%2e%2e/app.py", "nothing"):
        assert Call(running.url, None, f"/page/{name}", "GET").answer()[0] == 404
    assert "http" not in Path("qwen_jax/serving/page/index.html").read_text()


def test_pictures_are_attached_shown_and_sent_and_boxes_are_drawn(page, tokenizer, tmp_path):
    files = [tmp_path / "one.png", tmp_path / "two.jpg"]
    Image.new("RGB", (60, 30), "red").save(files[0])
    Image.new("RGB", (40, 80), "white").save(files[1])
    engine = ScriptedEngine(tokenizer, lambda prompt: "<ref>it</ref><box>(100,500),(900,750)</box> & <box>(9,9)</box>")
    with serving(engine, vision=SMALL_VISION) as running:
        page.problems.clear()
        resize(page, 360)
        page.open(running.url + "/")
        until(lambda: not page.evaluate("document.getElementById('attach').hidden"))
        chooser = page.call("Runtime.evaluate", expression="document.getElementById('pictures')")["result"]["objectId"]
        page.call("DOM.setFileInputFiles", files=list(map(str, files)), objectId=chooser)
        until(lambda: page.evaluate("document.querySelectorAll('#attached img').length") == 2)
        send(page, "Where?")
        idle(page)
        assert page.evaluate("document.querySelectorAll('#attached img').length") == 0
        assert page.evaluate("document.querySelectorAll('.user img').length") == 2
        assert turns(page)[0] == ["turn user", "Where?"]
        assert "user\nPicture 1: <img>" in engine.prompts[0] and "</img>\nPicture 2: <img>" in engine.prompts[0]
        for pixels, file in zip(engine.requests[0].images, files, strict=True):
            np.testing.assert_array_equal(pixels, squash(open_image(file), 28))
        # The box is drawn on the last picture, 40 wide and 80 high.
        canvas = "document.querySelector('.assistant canvas')"
        until(lambda: page.evaluate(f"{canvas}.width") == 40)
        colored = "[...document.querySelector('.assistant canvas').getContext('2d').getImageData({}, {}, 1, 1).data]"
        assert page.evaluate(colored.format(36, 50)) != [255] * 4 == page.evaluate(colored.format(20, 70))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.problems == []
        # A picture that the server refuses comes back to the person, with the text.
        files[0].write_bytes(b"no picture")
        page.call("DOM.setFileInputFiles", files=[str(files[0])], objectId=chooser)
        until(lambda: page.evaluate("document.querySelectorAll('#attached img').length") == 1)
        send(page, "And this?")
        idle(page)
        assert "picture 3 cannot be read" in page.evaluate("document.querySelector('.wrong').textContent")
        assert page.evaluate("document.querySelectorAll('#attached img').length") == 1
        page.evaluate("document.querySelector('#attached button').click()")
        assert page.evaluate("attached.length") == 0 and page.evaluate("document.getElementById('message').value")


def test_a_model_that_reads_text_alone_is_not_shown_pictures(page, running):
    page.open(running.url + "/")
    until(lambda: page.evaluate("document.getElementById('model').textContent") == "tiny")
    assert page.evaluate("document.getElementById('attach').hidden")
