"""Replies with tools and a schema: whatever the model samples, a call of a tool that fits, or content that fits."""

import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("llguidance", reason="the extra serve brings it")

from qwen_jax.conversion import load_pretrained, load_tokenizer  # noqa: E402
from qwen_jax.data.chatml import stop_ids  # noqa: E402
from qwen_jax.inference import Engine  # noqa: E402
from qwen_jax.inference.grammars import Grammars  # noqa: E402
from qwen_jax.inference.text import TextStream  # noqa: E402
from qwen_jax.serving.deltas import Reply  # noqa: E402
from qwen_jax.serving.formats import constraint_of  # noqa: E402
from qwen_jax.serving.prompts import THOUGHT, Prompt, ToolChoice  # noqa: E402
from tests.fakes import random_run  # noqa: E402
from tests.serving.scripted import ScriptedEngine, serving  # noqa: E402
from tests.serving.test_tools import answers, tool  # noqa: E402

ANSWER = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}, "says": {"enum": ["no", "\nAction: weather", "Observation: 5"]}},
    "required": ["rain"],
    "additionalProperties": False,
}
PARAMETERS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["北京", "\nFinal Answer: x"]},
            "days": {"type": "array", "items": {"const": 1}},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    "时 钟": {"properties": {"utc": {"type": ["boolean", "null"]}}, "additionalProperties": False},
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in PARAMETERS.items()]
# What a model that was trained on the form of tools is likely to write next; it may be cut at any place.
HABITS = (
    "Thought:",
    " I look.\n",
    "\nAction: ",
    "weather",
    "时 钟",
    "\nAction Input: ",
    '{"city": "北京"}',
    "{}",
    "\nFinal Answer: ",
    '{"rain": true}',
    "Observation:",
    "\nAction",
    "你",
)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, stop_ids(tokenizer), tokenizer.vocab_size)


def sampled(tokenizer, grammar, habits, seed, habitual):
    """Tokens of a whole reply: of some habits where they may come, else any that may, and the end where it may."""
    draws, matcher, tokens = random.Random(seed), grammar.start(), []
    wanted = [token for habit in habits for token in tokenizer.encode(habit)]
    while True:
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")).tolist()
        ends = [token for token in allowed if token >= tokenizer.num_ranks]
        others = [token for token in allowed if token < tokenizer.num_ranks]
        assert set(ends) <= set(grammar.end_ids)
        if ends and (not others or draws.random() < 0.5):
            return tokens
        assert len(tokens) < 2000
        if not wanted and len(tokens) > 100:  # or a thought would have no end
            wanted = tokenizer.encode(draws.choice(("\nFinal Answer: ", "\nAction: ")))
        token = wanted.pop(0) if wanted and (draws.random() < habitual or len(tokens) > 100) else None
        tokens.append(token if token in others else draws.choice(others))
        matcher.advance(tokens[-1])


def read(pieces, opening):
    """(content, call) of a reply whose bytes come in these pieces, to its end token."""
    text, reply = TextStream(), Reply(opening, PARAMETERS)
    content = "".join(reply.feed(text.feed(piece)) for piece in pieces)
    content += reply.feed(text.finish())
    rest, call = reply.finish(truncated=False, held=True)
    return content + rest, call


def test_a_reply_is_a_call_or_content_that_fits(tokenizer, grammars):
    seen = {"call": 0, "content": 0}

    @settings(max_examples=150, derandomize=True)  # as many of both in each run
    @given(
        st.lists(st.sampled_from(HABITS), max_size=8),
        st.integers(0, 2**32),
        st.sampled_from((0.0, 0.9, 1.0)),
        st.sampled_from(("", THOUGHT)),
        st.data(),
    )
    def check(habits, seed, habitual, opening, data):
        prompt = Prompt([], opening, tuple(PARAMETERS))
        grammar = constraint_of(ANSWER, ToolChoice(), prompt, PARAMETERS, lambda: grammars)
        tokens = sampled(tokenizer, grammar, habits, seed, habitual)
        encoded = [tokenizer.decode_bytes([token]) for token in tokens]
        content, call = read(encoded, opening)
        if call is not None:
            jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])
        else:
            jsonschema.validate(json.loads(content), ANSWER)
        seen["content" if call is None else "call"] += 1
        cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=6), label="cuts"))
        pieces = [b"".join(encoded[a:b]) for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
        assert read(pieces, opening) == (content, call)

    check()
    assert min(seen.values()) > 10


REPLIES = {
    "answer": ('{"rain": false}', "stop", '{"rain": false}', None),
    "thought and answer": ('Thought: so\n\nso.\nFinal Answer: {"rain": true}', "stop", '{"rain": true}', None),
    "call": (
        'Thought: I look.\nAction: weather\nAction Input: {"city": "北京"}',
        "tool_calls",
        "I look.",
        ("weather", '{"city": "北京"}'),
    ),
    "call without arguments": ("Thought:\nAction: 时 钟\nAction Input: {}", "tool_calls", None, ("时 钟", "{}")),
}


@pytest.mark.parametrize("case", REPLIES)
def test_the_official_client_gets_the_one_or_the_other(tokenizer, case):
    text, reason, content, call = REPLIES[case]
    engine = ScriptedEngine(tokenizer, lambda prompt: text)
    with serving(engine) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        choice = answers(client, engine, text, tools=TOOLS, response_format=FORM)
    found = [(one.function.name, one.function.arguments) for one in choice.message.tool_calls or []]
    assert (choice.finish_reason, choice.message.content, found) == (reason, content, [call] if call else [])
    # It is a reply that the constraint lets a model write.
    matcher = engine.requests[-1].constraint.start()
    for token in [*tokenizer.encode(text), tokenizer.im_end_id]:
        assert matcher.allowed()[token // 32] >> np.uint32(token % 32) & 1
        matcher.advance(token)


def test_a_model_that_writes_anything_is_held_to_it(tmp_path):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=2048)
    folder = random_run(tmp_path, **sizes)
    engine = Engine(*load_pretrained(folder), load_tokenizer(folder), slots=2)
    # It would think for ever, or write blanks.
    bias = {str(ord(one)): -100 for one in "T \n\r\t"}
    given = dict(
        model="tiny", messages=[{"role": "user", "content": "?"}], tools=TOOLS, response_format=FORM, logit_bias=bias
    )
    with serving(engine) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        for seed in range(3):
            (choice,) = client.chat.completions.create(**given, seed=seed).choices
            jsonschema.validate(json.loads(choice.message.content), ANSWER)
            with client.chat.completions.stream(**given, seed=seed) as stream:
                assert stream.get_final_completion().choices[0].message.content == choice.message.content
        (choice,) = client.chat.completions.create(
            **given | {"logit_bias": {str(ord("T")): 100}, "max_tokens": 20}
        ).choices
        assert choice.finish_reason == "length" and choice.message.content.startswith("Thought:")


WRONG = {
    "unknown word of a tool": (
        [tool("weather", city={"not": {}})],
        FORM,
        "tools",
        "cannot follow the parameters of a tool: Unimplemented",
    ),
    "tool of a text": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
        FORM,
        "tools",
        "'f' must be of type object, found 'string'",
    ),
    "unknown word of the form": (
        TOOLS,
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}},
        "response_format",
        "cannot follow its schema: Unimplemented",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_held_is_refused_in_one_line(tokenizer, case):
    tools, form, param, message = WRONG[case]
    with serving(ScriptedEngine(tokenizer, lambda prompt: "{}")) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "?"}], tools=tools, response_format=form
            )
    assert refused.value.param == param
