"""What the server takes and what it refuses; how it loses clients, and how it ends."""

import http.client
import json
import socket
import threading

import pytest

from tests.serving.scripted import ScriptedEngine, serving

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "Say it."}]}


class Call:
    """A request by hand, over a connection of its own."""

    def __init__(self, url, body=QUESTION, path=CHAT, method="POST", **headers):
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, data, {"Content-Type": "application/json"} | names)

    def answer(self):
        """(status, headers, JSON or text)."""
        response = self.connection.getresponse()
        text = response.read().decode()
        self.connection.close()
        return response.status, response.headers, json.loads(text) if text.startswith("{") else text

    def leave(self):
        """Breaks the connection."""
        self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def metric(url, name):
    """A number of /metrics, of all labels together."""
    _, _, text = Call(url, None, "/metrics", "GET").answer()
    found = [line for line in text.splitlines() if line.startswith(f"qwen_jax_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


class Steps:
    """An engine whose steps a test makes, one at a time."""

    def __init__(self, engine):
        self._engine, self._permits, self.done = engine, threading.Semaphore(0), threading.Semaphore(0)
        self._open = False

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        assert self._open or self._permits.acquire(timeout=300)
        chunks = self._engine.step()
        self.done.release()
        return chunks

    def allow(self):
        """Permits one step."""
        self._permits.release()

    def make(self, count=1):
        """Makes steps and waits until they are done."""
        for _ in range(count):
            self.allow()
            assert self.done.acquire(timeout=300)

    def let_go(self):
        """Steps need no permission any more."""
        self._open = True
        self._permits.release()


@pytest.fixture
def held(tokenizer):
    """A server with one row and room for one request to wait, whose steps the test makes."""
    steps = Steps(ScriptedEngine(tokenizer, lambda prompt: "a long reply" * 5, slots=1, tokens_a_step=1))
    with serving(steps, max_waiting=1, grace_seconds=1e6) as running:
        yield running
        steps.let_go()


def until(condition):
    """Waits for something that another thread does."""
    waited = threading.Event()
    for _ in range(30_000):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_and_one_that_waits_its_place(held, stream):
    thread = held.service.thread
    first = Call(held.url, QUESTION | {"stream": stream})
    until(lambda: thread.open == 1)
    second = Call(held.url, QUESTION | {"stream": stream})
    until(lambda: thread.open == 2)
    assert (thread.rows_in_use, thread.waiting) == (1, 1)
    status, headers, answer = Call(held.url).answer()
    assert status == 429 and int(headers["retry-after"]) > 0 and "x-should-retry" not in headers
    assert answer["error"]["type"] == "rate_limit_error" and "1 requests may wait" in answer["error"]["message"]
    held.engine.make(2)
    first.leave()
    until(lambda: held.service.metrics.disconnects._value.get() == 1)
    # The row is free after the step under way, which needs its permission; the next one is the second client's.
    held.engine.make(1)
    until(lambda: thread.open == 1)
    assert len(held.engine.cancelled) == 1 and held.engine.live == 1
    held.engine.let_go()
    status, _, answer = second.answer()
    assert status == 200
    assert "a long reply" in answer["choices"][0]["message"]["content"] if not stream else "[DONE]" in answer
    assert thread.open == held.engine.live == 0


def test_several_choices_take_a_row_each(held):
    status, _, answer = Call(held.url, QUESTION | {"n": 3}).answer()
    assert status == 400 and "from 1 to 2" in answer["error"]["message"]
    pair = Call(held.url, QUESTION | {"n": 2})
    until(lambda: held.service.thread.open == 2)
    pair.leave()
    until(lambda: held.service.metrics.disconnects._value.get() == 1)
    held.engine.allow()  # it is in a step, unless it saw request and cancellation together
    until(lambda: held.service.thread.open == 0)


def test_the_end_waits_for_replies_and_refuses_new_requests(held):
    before = Call(held.url, QUESTION | {"stream": True})
    until(lambda: held.service.thread.open == 1)
    held.server.drain()
    status, headers, answer = Call(held.url).answer()
    assert status == 503 and headers["x-should-retry"] == "false" and answer["error"]["type"] == "server_error"
    assert Call(held.url, None, "/health", "GET").answer()[0] == 503
    held.engine.let_go()
    assert before.answer()[2].endswith("data: [DONE]\n\n")
    held.runner.join(timeout=300)
    assert not held.runner.is_alive()
    with pytest.raises(OSError):
        Call(held.url)


def test_the_second_signal_ends_replies_with_an_error(held):
    before = Call(held.url, QUESTION | {"stream": True})
    until(lambda: held.service.thread.open == 1)
    held.server.drain()
    held.server.drain()
    until(lambda: held.service.thread._stopping)
    held.engine.let_go()
    _, _, text = before.answer()
    last = [json.loads(line[6:]) for line in text.strip().split("\n\n") if "DONE" not in line][-1]
    assert "error" in last and "ended before the reply was whole" in last["error"]["message"]
    held.runner.join(timeout=300)


def test_a_failed_step_ends_its_requests_and_no_others(tokenizer, caplog):
    engine = ScriptedEngine(tokenizer, lambda prompt: "fine")
    broken = threading.Event()
    step = engine.step

    def failing():
        if broken.is_set():
            broken.clear()
            engine._rows.clear()
            raise MemoryError("no room")
        return step()

    engine.step = failing
    with serving(engine) as running:
        for stream in (False, True):
            broken.set()
            status, _, answer = Call(running.url, QUESTION | {"stream": stream}).answer()
            text = json.dumps(answer)
            assert (status == 500 or stream) and "the engine failed (MemoryError: no room)" in text
            assert running.service.thread.open == 0
            assert Call(running.url).answer()[2]["choices"][0]["message"]["content"] == "fine"
    assert "a step of the engine failed" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_ours_has_the_form_of_errors_and_leaves_no_row(tokenizer, monkeypatch, caplog, stream):
    engine = ScriptedEngine(tokenizer, lambda prompt: "fine")
    with serving(engine) as running:
        with monkeypatch.context() as patch:
            patch.setattr("qwen_jax.serving.choices.Choice.take", lambda self, *chunk: 1 / 0)
            status, _, answer = Call(running.url, QUESTION | {"stream": stream}).answer()
        assert stream or (status == 500 and answer["error"]["type"] == "server_error")
        assert "the server failed (ZeroDivisionError)" in json.dumps(answer)
        until(lambda: "division by zero" in caplog.text)  # after the answer
        until(lambda: running.service.thread.open == engine.live == running.service.answering == 0)
        assert Call(running.url).answer()[0] == 200


def test_an_engine_that_cannot_go_on_is_seen_in_health(tokenizer, caplog):
    engine = ScriptedEngine(tokenizer, lambda prompt: {}["nothing"])
    with serving(engine) as running:
        status, _, answer = Call(running.url).answer()
        assert status == 500 and "KeyError" in answer["error"]["message"]
        assert Call(running.url, None, "/health", "GET").answer()[0] == 200
        engine.step = lambda: [1]  # no chunk
        engine.script = lambda prompt: "fine"
        assert Call(running.url).answer()[0] == 503
        assert Call(running.url).answer()[0] == Call(running.url, None, "/health", "GET").answer()[0] == 503
    assert "the thread of the engine failed" in caplog.text


@pytest.fixture(scope="module")
def small(tokenizer):
    """A server with a key, which takes small bodies only."""
    with serving(ScriptedEngine(tokenizer, lambda prompt: "fine"), api_key="key", max_request_bytes=5000) as it:
        yield it


def test_the_key_is_asked_for_everywhere_but_for_health(small):
    for path, method in ((CHAT, "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "key"}):
            status, _, answer = Call(
                small.url, QUESTION if method == "POST" else None, path, method, **headers
            ).answer()
            assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert Call(small.url, None, "/health", "GET").answer()[0] == 200
    assert Call(small.url, QUESTION, Authorization="Bearer key").answer()[0] == 200


def nested(depth):
    return b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"


BODIES = {
    "too large": (b" " * 6000 + b"{}", 413, "5000 bytes"),
    "much too large": (b" " * 60_000, 413, "5000 bytes"),
    "no JSON": (b"{", 400, "no JSON"),
    "nothing": (b"", 400, "no JSON"),
    "not UTF-8": (b'{"a": "\xff"}', 400, "no JSON"),
    "a list": (b"[]", 400, "expected a JSON object"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN"),
    "a number of many digits": (b'{"n": 1' + b"0" * 4800 + b"}", 400, "no JSON"),
    "an infinite number": (
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        400,
        "temperature",
    ),
    "a temperature that float32 has not": (
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1' + b"0" * 400 + b"}",
        400,
        "temperature: must be 0",
    ),
    "a penalty that float32 has not": (
        b'{"messages": [{"role": "user", "content": "x"}], "repetition_penalty": 1' + b"0" * 400 + b"}",
        400,
        "repetition_penalty: must be from",
    ),
    "calls that are no list": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": 5}]}',
        400,
        "calls that are no list (message 1: int)",
    ),
    "nested": (nested(100), 400, "nested deeper than 64"),
    "nested more": (nested(2400), 400, "nested deeper than 64"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_costs_too_much_or_is_no_request_is_refused(small, case):
    body, expected, text = BODIES[case]
    status, _, answer = Call(small.url, body, Authorization="Bearer key").answer()
    assert status == expected and text in answer["error"]["message"]
    assert small.service.answering == small.service.thread.open == 0


def test_a_body_of_unknown_length_is_cut_too(small):
    connection = http.client.HTTPConnection(small.url.removeprefix("http://"), timeout=300)
    parts = (b" " * 1000 for _ in range(20))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    connection.request("POST", CHAT, parts, headers, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_what_a_page_of_another_site_can_send_is_refused(small, held):
    status, _, answer = Call(small.url, Authorization="Bearer key", Content_Type="text/plain").answer()
    assert status == 415 and "application/json" in answer["error"]["message"]
    # Browsers take the second and the third for names of sites, too.
    for host in ("evil.example:80", "a{b}.evil.example", 'a"b.evil.example:80', "evil.example:99999", "[::1", ""):
        status, _, answer = Call(held.url, None, "/v1/models", "GET", Host=host).answer()
        assert status == 403 and host.rpartition(":")[0] in answer["error"]["message"], host
    for host in ("localhost", "LocalHost:80", "127.0.0.1:80", "[::1]:80"):
        assert Call(held.url, None, "/v1/models", "GET", Host=host).answer()[0] == 200, host
    assert "access-control-allow-origin" not in Call(held.url, None, "/v1/models", "GET").answer()[1]


def test_other_paths_and_methods_have_the_form_of_errors_too(small):
    status, _, answer = Call(small.url, None, "/v2", "GET").answer()
    assert status == 404 and "/v2" in answer["error"]["message"]
    status, headers, answer = Call(small.url, None, CHAT, "GET").answer()
    assert status == 405 and headers["allow"] == "POST" and answer["error"]["message"]


def test_metrics_count_requests_tokens_and_times(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda prompt: "abcdefgh")
    with serving(engine) as running:
        Call(running.url).answer()
        Call(running.url, QUESTION | {"stream": True, "n": 2}).answer()
        Call(running.url, QUESTION | {"n": 0}).answer()
        prompt = len(engine.requests[0].prompt)
        expected = {
            'requests_total{path="/v1/chat/completions",status="200"}': 2,
            'requests_total{path="/v1/chat/completions",status="400"}': 1,
            "prompt_tokens_total": 2 * prompt,
            "generated_tokens_total": 3 * 9,
            "time_to_first_token_seconds_count": 3,
            "time_between_tokens_seconds_count": 3 * 2,
            "rows ": 4,
            "rows_in_use": 0,
            "waiting_requests": 0,
            "disconnects_total": 0,
        }
        assert {name: metric(running.url, name) for name in expected} == expected
