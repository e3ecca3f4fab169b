"""Every field of a body has an effect, is refused by its name, or is reported: none is passed over in silence."""

import http.client
import json
import logging
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")

from openai.types import completion_create_params as of_completions  # noqa: E402
from openai.types.chat import completion_create_params as of_chat  # noqa: E402

from qwen_jax.serving import known_fields  # noqa: E402
from tests.serving.scripted import ScriptedEngine, serving  # noqa: E402
from tests.serving.test_openai_client import QUESTION, post  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "openai_fields.md"
PATHS = {"/v1/chat/completions": {"messages": QUESTION}, "/v1/completions": {"prompt": "Say it."}}
TAKEN = {"/v1/chat/completions": known_fields.CHAT, "/v1/completions": known_fields.COMPLETION}
REFUSED = {
    "/v1/chat/completions": known_fields.REFUSED_BY_CHAT,
    "/v1/completions": known_fields.REFUSED_BY_COMPLETIONS,
}
NO_EFFECT = {
    "/v1/chat/completions": known_fields.NO_EFFECT | known_fields.NO_EFFECT_OF_CHAT,
    "/v1/completions": known_fields.NO_EFFECT,
}
OF_OPENAI = {
    path: {*module.CompletionCreateParamsBase.__annotations__, "stream"}
    for path, module in zip(PATHS, (of_chat, of_completions), strict=True)
}


@pytest.fixture(scope="module")
def running(tokenizer):
    with serving(ScriptedEngine(tokenizer, lambda prompt: "Hello")) as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
def test_each_field_of_openai_has_one_place_here_and_on_the_page(path):
    places = [set(TAKEN[path]), set(NO_EFFECT[path]), set(REFUSED[path])]
    assert OF_OPENAI[path] <= set().union(*places)
    assert sum(map(len, places)) == len(set().union(*places))
    page = PAGE.read_text()
    assert [name for name in sorted(set().union(*places)) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("path", PATHS)
def test_each_refused_field_is_refused_by_its_name_and_passes_without_effect(running, path):
    for name, (harmless, instead) in REFUSED[path].items():
        status, _, answer = post(running.url, path, PATHS[path] | {name: {"any": "value"}})
        assert status == 400 and answer["error"]["param"] == name and answer["error"]["code"] == "unsupported_value"
        assert instead in answer["error"]["message"]
        for value in (None, *harmless):
            status, headers, answer = post(running.url, path, PATHS[path] | {name: value})
            assert status == 200 and "x-ignored-fields" not in headers, (name, value, answer)


@pytest.mark.parametrize("path", PATHS)
def test_fields_without_effect_have_a_type(running, path):
    values = {"user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": False}
    for name in NO_EFFECT[path]:
        status, headers, _ = post(running.url, path, PATHS[path] | {name: values.get(name, "text")})
        assert status == 200 and "x-ignored-fields" not in headers
        status, _, answer = post(running.url, path, PATHS[path] | {name: 5})
        assert status == 400 and answer["error"]["param"] == name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_unknown_fields_are_reported_to_the_client_and_once_in_the_log(running, path, stream, caplog):
    unknown = {"zest": 1, "user_name": [], "häßlich\r\nX-Evil: 1": 1, "absent": None, **{f"f{i}": 0 for i in range(30)}}
    name = f"once_{stream}_{path[4:8].strip('/')}"
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=300)
    with caplog.at_level(logging.WARNING, logger="qwen_jax.serving.app"):
        for _ in range(2):
            body = json.dumps(PATHS[path] | {"stream": stream, name: 1})
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.read() and response.headers["x-ignored-fields"] == name
    assert sum(name in record.getMessage() for record in caplog.records) == 1
    body = json.dumps(PATHS[path] | {"stream": stream} | unknown)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    reported = response.headers["x-ignored-fields"].split(", ")
    assert reported[0] == "f0" and reported[-1] == "..." and len(reported) == 21 and "X-Evil" not in response.headers


def test_fields_of_messages_are_read_refused_or_reported(running):
    path = "/v1/chat/completions"
    messages = [{"role": "user", "content": "x", "name": "Bob", "weight": 1, "none": None}]
    status, headers, _ = post(running.url, path, {"messages": messages})
    assert (status, headers["x-ignored-fields"]) == (200, "messages.name, messages.weight")
    for name in ("refusal", "audio"):
        messages = [*QUESTION, {"role": "assistant", "content": "x", name: {"id": "a"}}, *QUESTION]
        status, _, answer = post(running.url, path, {"messages": messages})
        assert status == 400 and answer["error"]["param"] == "messages"
        assert f"messages.{name}: " in answer["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_options_of_streams_need_a_stream(running, path):
    given = PATHS[path] | {"stream_options": {"include_usage": True}}
    status, _, answer = post(running.url, path, given)
    assert status == 400 and answer["error"]["param"] == "stream_options"
    assert "set stream to true" in answer["error"]["message"]
    given = PATHS[path] | {"stream": True, "stream_options": {"include_obfuscation": True}}
    status, _, answer = post(running.url, path, given)
    assert status == 400 and "stream_options.include_obfuscation: True is not" in answer["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_options_of_streams_are_reported_unless_they_are_null(running, path):
    options = {"include_usage": None, "include_obfuscation": None, "absent": None, "zest": 1}
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=300)
    body = json.dumps(PATHS[path] | {"stream": True, "stream_options": options})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.read() and response.headers["x-ignored-fields"] == "stream_options.zest"


def test_answers_have_the_fields_that_openai_requires(running):
    body = {"messages": QUESTION, "logprobs": True}
    _, _, answer = post(running.url, "/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert set(choice["logprobs"]) == {"content", "refusal"}
    for path, given in PATHS.items():
        connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=300)
        body = json.dumps(given | {"stream": True, "stream_options": {"include_usage": True}})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        *chunks, end = connection.getresponse().read().decode().split("\n\n")[:-1]
        *chunks, last = [json.loads(chunk[6:]) for chunk in chunks]
        assert end == "data: [DONE]" and not last["choices"] and last["usage"]["completion_tokens"]
        assert chunks and all(chunk["usage"] is None for chunk in chunks)
