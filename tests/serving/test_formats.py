"""Replies constrained to JSON, to a schema, or to a call, of a model that writes anything: its weights are random."""

import json
from typing import Literal

import jsonschema
import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("llguidance", reason="the extra serve brings it")

import pydantic  # noqa: E402  openai needs it

from qwen_jax.conversion import load_pretrained, load_tokenizer  # noqa: E402
from qwen_jax.inference import Engine  # noqa: E402
from qwen_jax.inference.constraints import ConstraintFailed, words  # noqa: E402
from tests.fakes import random_run  # noqa: E402
from tests.serving.scripted import serving  # noqa: E402

QUESTION = [{"role": "user", "content": "Weather?"}]
# The random model would write blanks where they may stand.
NO_BLANKS = {str(ord(blank)): -100 for blank in " \n\r\t"}
PLAIN = dict(model="tiny", messages=QUESTION, logit_bias=NO_BLANKS, seed=3)


class Report(pydantic.BaseModel):
    """What a reply should be."""

    city: Literal["Paris", "北京"]
    days: list[bool] = pydantic.Field(max_length=3)
    wind: Literal["no", "some"] | None


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "北京", "Observation: \n"]}},
    "required": ["city"],
}
CLOCK = {
    "type": "object",
    "properties": {"utc": {"type": "boolean"}},
    "required": ["utc"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {**schema, "additionalProperties": False}}}
    for name, schema in (("weather", WEATHER), ("时 钟", CLOCK))
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=2048)
    folder = random_run(tmp_path_factory.mktemp("formats"), **sizes)
    engine = Engine(*load_pretrained(folder), load_tokenizer(folder), slots=2, prefix_cache_tokens=2048)
    with serving(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_client_parses_what_a_schema_allows(client):
    replies = client.chat.completions.parse(**PLAIN, response_format=Report, n=2).choices
    for reply in replies:
        assert reply.finish_reason == "stop" and isinstance(reply.message.parsed, Report)
    assert replies[0].message.content != replies[1].message.content
    with client.chat.completions.stream(**PLAIN, response_format=Report) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == replies[0].message.parsed and streamed.content == replies[0].message.content


def test_any_object_is_json_until_it_is_cut(client):
    given = PLAIN | {"logit_bias": NO_BLANKS | {str(ord("}")): 100}, "temperature": 0}
    reply = client.chat.completions.create(**given, response_format={"type": "json_object"}).choices[0]
    assert json.loads(reply.message.content) == {} and reply.finish_reason == "stop"
    given = PLAIN | {"logit_bias": NO_BLANKS | {str(ord("}")): -100}, "max_tokens": 5}
    reply = client.chat.completions.create(**given, response_format={"type": "json_object"}).choices[0]
    assert reply.message.content.startswith("{") and reply.finish_reason == "length"
    text = client.chat.completions.create(**given, response_format={"type": "text"}).choices[0]
    assert text.message.content == client.chat.completions.create(**given).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "时 钟"}}])
def test_a_call_that_has_to_be_made_is_made(client, choice):
    schemas = {"weather": WEATHER, "时 钟": CLOCK}
    called = set()
    for seed in range(3):
        given = PLAIN | {"tools": TOOLS, "tool_choice": choice, "seed": seed}
        reply = client.chat.completions.create(**given).choices[0]
        assert reply.finish_reason == "tool_calls"
        (call,) = reply.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        called.add(call.function.name)
    with client.chat.completions.stream(**given) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert called == {"时 钟"} or choice == "required"


WRONG = {
    "word": ("json", "must be"),
    "type": ({"type": "xml"}, "must be"),
    "no schema": ({"type": "json_schema", "json_schema": {"name": "x"}}, "must be"),
    "unknown word": ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "cannot follow its schema: Unim"),
    "large": ({"type": "json_schema", "json_schema": {"schema": {"enum": [1] * 20_000}}}, "10000 values at most"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_formats_are_refused_in_one_line(client, case):
    form, message = WRONG[case]
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**PLAIN, response_format=form)
    assert refused.value.param == "response_format"


def test_a_form_goes_with_tools_that_may_not_be_called(client):
    given = PLAIN | {"logit_bias": NO_BLANKS | {str(ord("}")): 100}, "temperature": 0}
    form = {"type": "json_object"}
    reply = client.chat.completions.create(**given, tools=TOOLS, tool_choice="none", response_format=form).choices[0]
    assert json.loads(reply.message.content) == {}


class Costly:
    """Gives up after two tokens."""

    def __init__(self):
        self.done = 0

    def allowed(self):
        if self.done == 2:
            raise ConstraintFailed("too many states")
        return np.full(words(464), np.iinfo(np.uint32).max, np.uint32)

    def advance(self, token):
        self.done += 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_is_too_costly_to_follow_is_an_error_of_its_own_request(client, running, monkeypatch, stream):
    given = PLAIN | {"response_format": {"type": "json_object"}, "max_tokens": 8, "stream": stream}
    with monkeypatch.context() as patched:
        patched.setattr("qwen_jax.inference.grammars.Grammar.start", lambda grammar: Costly())
        with pytest.raises(openai.APIError, match="too costly to follow: give a simpler one"):
            list(client.chat.completions.create(**given))
    assert list(client.chat.completions.create(**given)) and running.engine.live == 0
