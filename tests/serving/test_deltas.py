"""The pieces of a reply are together what it is as a whole, however its bytes are cut; a call comes whole or not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.inference.text import TextStream
from qwen_jax.serving.deltas import Reply, ToolCall

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {"weather": WEATHER, "天气": {"type": "object"}}
PARTS = (
    "Thought:",
    "Thought: I look.",
    "\nAction:",
    "Action:",
    " weather",
    " 天气",
    "\nAction Input:",
    ' {"city": "巴黎"}',
    ' {"city": ',
    "\nFinal Answer:",
    "Final Answer:",
    "Observation:",
    "\n",
    " ",
    "你好",
    "👩‍🚀",
    "café",
    "A",
    "STOP",
)
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=8).map("".join)
openings = st.sampled_from(("", "Thought:", "Thought: I should use a tool.\nAction:"))


def replied(pieces, opening, tools, stops=("Observation:",), truncated=False):
    """(content, call) of a reply whose bytes come in these pieces."""
    text, reply = TextStream(stops), Reply(opening, tools)
    content = "".join(reply.feed(text.feed(piece)) for piece in pieces)
    content += reply.feed(text.finish())
    rest, call = reply.finish(truncated)
    return content + rest, call


@given(texts, openings, st.sampled_from((None, {}, TOOLS)), st.booleans(), st.data())
def test_the_pieces_of_a_reply_are_the_whole_of_it(text, opening, tools, truncated, data):
    encoded = text.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=12), label="cuts"))
    pieces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    stops = data.draw(st.sampled_from(((), ("Observation:",), ("STOP", "Observation:", "你好", "OP"))), label="stops")
    opening = opening if tools is not None else ""
    expected = replied([encoded], opening, tools, stops, truncated)
    assert replied(pieces, opening, tools, stops, truncated) == expected
    assert replied([bytes([byte]) for byte in encoded], opening, tools, stops, truncated) == expected


@given(texts, openings)
def test_a_call_is_of_a_given_tool_and_fits_its_schema(text, opening):
    _, call = replied([text.encode("utf-8", "surrogatepass")], opening, TOOLS)
    if call is not None:
        assert call.name in TOOLS and isinstance(json.loads(call.arguments), dict)
        assert call.name != "weather" or isinstance(json.loads(call.arguments)["city"], str)


REPLIES = {
    # reply, opening: content, call
    "plain": ("Hello!", "", "Hello!", None),
    "answer": ("Thought: I now know the final answer.\nFinal Answer: 42\n", "", "42\n", None),
    "answer at once": ("Final Answer: 42", "", "42", None),
    "answer, gone on": (" I know.\nFinal Answer: 42", "Thought:", "42", None),
    "thought alone": (" Hm.", "Thought:", "Hm.", None),
    "call": (
        'Thought: I look.\nAction: weather\nAction Input: {"city": "巴黎"}\nObservation: 5',
        "",
        "I look.",
        ToolCall("weather", '{"city": "巴黎"}'),
    ),
    "call, gone on": (" More.\nAction: 天气\nAction Input: {}\n", "Thought:", "More.", ToolCall("天气", "{}")),
    "call after plain text": ("Let me see.\nAction: 天气\nAction Input: {}", "", "Let me see.", ToolCall("天气", "{}")),
    "call over lines": (
        'Thought: a\nAction: weather\nAction Input: {\n  "city":\n "x"\n}\n',
        "",
        "a",
        ToolCall("weather", '{\n  "city":\n "x"\n}'),
    ),
    "call that was begun": (
        ' weather\nAction Input: {"city": "x"}',
        "Thought: I should use a tool.\nAction:",
        "",
        ToolCall("weather", '{"city": "x"}'),
    ),
    "unknown tool": ("Thought: a\nAction: rm\nAction Input: {}", "", "Thought: a\nAction: rm\nAction Input: {}", None),
    "no JSON": (
        "Thought: a\nAction: 天气\nAction Input: Paris",
        "",
        "Thought: a\nAction: 天气\nAction Input: Paris",
        None,
    ),
    "no object": ("\nAction: 天气\nAction Input: [1]", "", "\nAction: 天气\nAction Input: [1]", None),
    "against the schema": (
        'Thought: a\nAction: weather\nAction Input: {"city": 5}',
        "",
        'Thought: a\nAction: weather\nAction Input: {"city": 5}',
        None,
    ),
    "half a call": ("Thought: a\nAction: 天气\nAction Input: {", "", "Thought: a\nAction: 天气\nAction Input: {", None),
    "no input": ("Thought: a\nAction: 天气\n", "", "Thought: a\nAction: 天气\n", None),
    "input before action": ("Action Input: {}\nAction: 天气", "", "Action Input: {}\nAction: 天气", None),
    "action in an answer": (
        "Thought: a\nFinal Answer: write\nAction: 天气\nAction Input: {}",
        "",
        "write\nAction: 天气\nAction Input: {}",
        None,
    ),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_reply_becomes_content_and_a_call(case):
    text, opening, content, call = REPLIES[case]
    assert replied([text.encode()], opening, TOOLS) == (content, call)


def test_a_reply_that_was_cut_makes_no_call():
    text = "Thought: a\nAction: 天气\nAction Input: {}"
    assert replied([text.encode()], "", TOOLS, truncated=True) == (text, None)


def test_a_thought_is_held_back_and_an_answer_comes_as_it_is_written():
    reply = Reply("", TOOLS)
    assert [reply.feed(piece) for piece in ("Th", "ought: so", "\nFinal Ans", "wer:", " ", "4", "2")] == [
        *[""] * 5,
        "4",
        "2",
    ]
    reply = Reply("", TOOLS)
    assert [reply.feed(piece) for piece in ("Tha", "t is", "\n", "Act", "ually", "\nAction:", " x")] == [
        "Tha",
        "t is",
        "",
        "",
        "\nActually",
        "",
        "",
    ]
