"""Conversations to tokens and loss weights: the released masks token by token, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import chat, chatml, react
from qwen_jax.data.conversations import Call, Conversation, Message, Unusable, check, from_openai, from_sharegpt
from qwen_jax.data.packers import Document, fit
from qwen_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer, write_ranks

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden"
WEATHER = {"name": "weather", "description": "Looks it up.", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Bytes, and one token of two line ends: it must not arise where header and content meet."""
    path = tmp_path_factory.mktemp("chat") / "bytes.tiktoken"
    write_ranks({**{bytes([byte]): byte for byte in range(256)}, b"\n\n": 256}, path)
    return Tokenizer(path)


def _messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _golden(name: str) -> dict:
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"needs {name} of ../shared/golden")
    return json.loads(path.read_text(encoding="utf-8"))


def test_ids_and_masks_are_those_of_the_released_finetune():
    """Each case of finetune.py's own output; in one, text that looks like a control token stays text here."""
    golden, tokenizer = _golden("chatml/finetune.json"), Tokenizer()
    compared = 0
    for case in golden["cases"]:
        conversation = from_sharegpt({"conversations": case["conversations"]})
        ours = chat.encode(tokenizer, conversation, system=case["system_message"])
        if any("<|" in turn["value"] for turn in case["conversations"]):
            shown = [turn["value"] for turn in case["conversations"]]
            turns = chatml.turns(tokenizer, [{"role": "user", "content": text} for text in shown], "")
            assert [tokenizer.decode(turn.content) for turn in turns[1:]] == shown
            assert all(token < tokenizer.num_ranks for turn in turns for token in turn.content)
            continue
        length = min(len(ours.tokens), case["max_len"])
        assert ours.tokens[:length].tolist() == case["input_ids"][:length], case["name"]
        carries = [label != golden["ignore"] for label in case["labels"]]
        assert ours.loss_weights[:length].tolist() == carries[:length], case["name"]
        # finetune.py fills up with <|endoftext|>, without loss: none ends a conversation.
        assert set(case["input_ids"][length:]) <= {golden["pad_token_id"]} and not any(carries[length:])
        compared += 1
    assert compared == 5
    for refused in golden["refused"]:
        if not refused["conversations"]:
            with pytest.raises(Unusable, match="empty conversation"):
                check(from_sharegpt(refused))


@pytest.mark.parametrize("loss_on", chat.LOSS_ON)
def test_the_two_rules_written_down(tokenizer, loss_on):
    conversation = from_openai(_messages(("system", "S"), ("user", "Q"), ("assistant", "A")))
    encoded = chat.encode(tokenizer, conversation, loss_on=loss_on)
    start, end, line = tokenizer.im_start_id, tokenizer.im_end_id, ord("\n")
    expected = [start, *b"system\nS", end, line, start, *b"user\nQ", end, line, start, *b"assistant\nA", end, line]
    assert encoded.tokens.tolist() == expected
    weights = {
        # <|im_start|>, the role and its line end, the content, <|im_end|> and the line end after it.
        "released": [1, *[0] * 7, 0, 1, 1, 1, *[0] * 5, 0, 1, 1, 1, *[0] * 10, 1, 1, 1],
        "report": [0, *[0] * 7, 0, 0, 0, 0, *[0] * 5, 0, 0, 0, 0, *[0] * 10, 1, 1, 0],
    }
    assert encoded.loss_weights.tolist() == weights[loss_on]
    assert encoded.turn_ends.tolist() == [len(expected)] and not len(encoded.segment_lengths)


def test_training_encodes_by_pieces_as_serving_does():
    """Content that begins with a line end: 198 twice, where one string through a tokenizer has 271."""
    tokenizer = Tokenizer()
    row = _messages(("user", "\nhello"), ("assistant", "\nhello"))
    ids = chat.encode(tokenizer, from_openai(row)).tokens.tolist()
    assert ids[-9:] == [151645, 198, 151644, 77091, 198, 198, 14990, 151645, 198]
    assert tokenizer.encode_with_control_tokens("<|im_start|>assistant\n\nhello") == [151644, 77091, 271, 14990]
    prompt = chatml.encode_prompt(tokenizer, row["messages"][:1])
    assert ids[: len(prompt)] == prompt and ids[len(prompt) :] == [198, 14990, 151645, 198]


TEXT = st.lists(st.one_of(st.sampled_from(CONTROL_TOKENS[:4]), st.text(min_size=1, max_size=8)), min_size=1, max_size=4)
TEXTS = TEXT.map("".join)
CONVERSATIONS = st.builds(
    lambda system, turns: [*system, *(one for turn in turns for one in turn)],
    st.lists(TEXTS.map(lambda text: ("system", text)), max_size=1),
    st.lists(
        st.tuples(TEXTS.map(lambda t: ("user", t)), TEXTS.map(lambda t: ("assistant", t))), min_size=1, max_size=4
    ),
)


@given(turns=CONVERSATIONS)
def test_no_text_becomes_a_control_token_and_masks_follow_the_turns(tokenizer, turns):
    row = _messages(*turns)
    parts = chatml.turns(tokenizer, row["messages"])
    ours = {rule: chat.encode(tokenizer, from_openai(row), loss_on=rule) for rule in chat.LOSS_ON}
    for encoded in ours.values():
        assert encoded.tokens.tolist() == [token for turn in parts for token in turn.ids]
        control = encoded.tokens[encoded.tokens >= tokenizer.num_ranks]
        assert control.tolist() == [tokenizer.im_start_id, tokenizer.im_end_id] * len(parts)
    released, report = (ours[rule].loss_weights for rule in chat.LOSS_ON)
    assert (released >= report).all()
    said = [token for turn in parts if turn.role == "assistant" for token in (*turn.content, tokenizer.im_end_id)]
    assert ours["report"].tokens[report == 1].tolist() == said
    control = ours["released"].tokens >= tokenizer.num_ranks
    assert released[control].all() and (released - report)[~control].sum() == len(parts)  # line ends after turns


@given(turns=CONVERSATIONS, length=st.integers(2, 120))
def test_truncation_never_leaves_half_a_turn_with_loss(tokenizer, turns, length):
    encoded = chat.encode(tokenizer, from_openai(_messages(*turns)), loss_on="report")
    document = Document(encoded.tokens, encoded.loss_weights, ends=encoded.turn_ends)
    fitted = fit([document], length)
    whole = [end for end in encoded.turn_ends if end <= length]
    assert bool(fitted.documents) == bool(whole)
    for kept in fitted.documents:
        assert len(kept.tokens) == max(whole) and kept.weights().any()
        assert kept.tokens[-2:].tolist() == [tokenizer.im_end_id, ord("\n")]
        # As many answers with loss as there are ends: none is begun and not ended.
        starts = np.diff(kept.weights().astype(int), prepend=0) == 1
        assert starts.sum() == len(whole) == (kept.tokens[kept.weights() == 1] == tokenizer.im_end_id).sum()


def test_layouts_and_forms_of_content_agree(tokenizer):
    wanted = chat.encode(tokenizer, from_openai(_messages(("system", "S"), ("user", "Q?"), ("assistant", "A"))))
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
    same = [
        from_openai({"messages": [*_messages(("developer", "S"), ("user", parts), ("assistant", "A"))["messages"]]}),
        from_sharegpt(
            {"system": "S", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]}
        ),
        from_sharegpt(
            {
                "conversations": [
                    {"from": f, "value": v}
                    for f, v in zip(("system", "user", "assistant"), ("S", "Q?", "A"), strict=True)
                ]
            }
        ),
    ]
    for conversation in same:
        encoded = chat.encode(tokenizer, conversation)
        assert encoded.tokens.tolist() == wanted.tokens.tolist()
        assert encoded.loss_weights.tolist() == wanted.loss_weights.tolist()


BAD = {
    "empty conversation": [],
    "unknown role": [("user", "a"), ("root", "b")],
    "two system messages": [("system", "a"), ("user", "b"), ("system", "c"), ("assistant", "d")],
    "a system message that is not first": [("user", "b"), ("system", "c"), ("assistant", "d")],
    "empty turn of the assistant": [("user", "a"), ("assistant", None)],
    "empty turn of the user": [("user", ""), ("assistant", "b")],
    "the assistant speaks first": [("assistant", "a"), ("user", "b"), ("assistant", "c")],
    "no turn of the assistant": [("system", "a"), ("user", "b")],
    "content that is no text": [("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "b")],
    "a result without a call": [("user", "a"), ("tool", "b"), ("assistant", "c")],
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_trained_on_is_named(tokenizer, reason):
    with pytest.raises(Unusable, match=f"^{reason}") as error:
        chat.encode(tokenizer, from_openai(_messages(*BAD[reason])))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "expected an object with a list 'messages', found text"),
        ({"messages": "x"}, "expected an object with a list 'messages'"),
        ([], "expected an object with a list 'messages', found list"),
        ({"messages": ["x"]}, "message 0: expected an object, found str"),
        ({"messages": [], "tools": [3]}, "expected a list of objects in 'tools'"),
    ],
)
def test_a_row_of_another_layout_is_an_error(row, message):
    with pytest.raises(ValueError, match=message) as error:
        from_openai(row)
    assert not isinstance(error.value, Unusable)


def _called(*messages: dict, tools: tuple = (WEATHER,)) -> dict:
    return {"messages": list(messages), "tools": list(tools)}


def _call(name: str = "weather", arguments: object = '{"city": "Rome"}', **more) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


ASKED = {"role": "user", "content": "Rome?"}


def test_calls_and_results_become_one_turn_and_results_carry_no_loss(tokenizer):
    row = _called(
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [_call(id="c1")]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 21}'},
        {"role": "assistant", "content": "21 degrees."},
    )
    system, question, turn = react.say(
        check(from_openai({"messages": [{"role": "system", "content": "S"}, *row["messages"]], "tools": row["tools"]}))
    )
    assert system.content == "S" and question.content.endswith("\n\nBegin!\n\nQuestion: Rome?")
    assert "weather: Call this tool to interact with the weather API." in question.content
    assert 'Looks it up. Parameters: {"type": "object"}' in question.content
    assert turn.content == (
        'Thought: \nAction: weather\nAction Input: {"city": "Rome"}\nObservation: {"degrees": 21}\n'
        "Thought: I now know the final answer.\nFinal Answer: 21 degrees."
    )
    encoded = chat.encode(tokenizer, from_openai(row), loss_on="report")
    said = tokenizer.decode(encoded.tokens[encoded.loss_weights == 1].tolist())
    assert said == turn.content.replace(' {"degrees": 21}', "") + "<|im_end|>"


def test_a_token_that_begins_in_a_result_carries_no_loss():
    """In the released vocabulary a bracket and the line end after it are one token."""
    tokenizer = Tokenizer()
    row = _called(
        ASKED,
        {"role": "assistant", "content": "Look.", "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": '{"é": "21"}'},
        {"role": "assistant", "content": "21"},
    )
    encoded = chat.encode(tokenizer, from_openai(row), loss_on="report")
    texts = [tokenizer.decode([token]) for token in encoded.tokens[encoded.loss_weights == 1].tolist()]
    assert "".join(texts) == (
        "Thought: Look.\nAction: weather\nAction Input: {}\nObservation:"
        "Thought: I now know the final answer.\nFinal Answer: 21<|im_end|>"
    )


def test_several_calls_of_one_message_follow_each_other(tokenizer):
    calls = [_call(arguments={"city": "Rome"}, id="a"), _call(arguments={"city": "Köln"}, id="b")]
    row = _called(
        ASKED,
        {"role": "assistant", "content": "Both.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "9"},
        {"role": "tool", "tool_call_id": "a", "content": "21"},
        {"role": "assistant", "content": "Rome."},
    )
    (_, turn) = react.say(check(from_openai(row)))
    assert turn.content.startswith(
        'Thought: Both.\nAction: weather\nAction Input: {"city": "Rome"}\nObservation: 21\n'
        'Thought: \nAction: weather\nAction Input: {"city": "Köln"}\nObservation: 9\nThought: I now'
    )


@pytest.mark.parametrize("result", [None, "21"])
def test_a_turn_that_waits_for_a_tool_does_not_learn_to_end(tokenizer, result):
    last = [] if result is None else [{"role": "tool", "content": result}]
    row = _called(ASKED, {"role": "assistant", "content": "I look.", "tool_calls": [_call()]}, *last)
    encoded = chat.encode(tokenizer, from_openai(row))
    said = tokenizer.decode(encoded.tokens[encoded.loss_weights == 1].tolist())
    assert said.endswith('Action Input: {"city": "Rome"}\nObservation:')
    assert tokenizer.decode(encoded.tokens.tolist()).endswith(
        f"Observation:{'' if result is None else ' 21'}<|im_end|>\n"
    )


def test_tools_in_sharegpts_layout():
    turns = [
        ("human", "Rome?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("observation", "21"),
        ("gpt", "21."),
    ]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": json.dumps([WEATHER])}
    call = Message("assistant", "", (Call("weather", '{"city": "Rome"}'),))
    wanted = (Message("user", "Rome?"), call, Message("tool", "21"), Message("assistant", "21."))
    assert check(from_sharegpt(row)) == Conversation(wanted, (WEATHER,))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _called(
                ASKED, {"role": "assistant", "tool_calls": [_call()]}, ASKED, {"role": "assistant", "content": "x"}
            ),
            "a call without a result",
        ),
        (
            _called(ASKED, {"role": "assistant", "tool_calls": [_call("radar")]}),
            r"a call of an unknown tool \(message 1: radar; listed are weather\)",
        ),
        (_called(ASKED, {"role": "assistant", "tool_calls": [_call()]}, tools=()), "listed are none"),
        (_called(ASKED, {"role": "assistant", "tool_calls": [_call(), _call()]}), "several calls without results"),
        (
            _called(
                ASKED,
                {"role": "assistant", "tool_calls": [_call(id="a")]},
                {"role": "tool", "tool_call_id": "b", "content": "1"},
            ),
            "a result without a call.*id 'b'",
        ),
        (_called(ASKED, {"role": "assistant", "tool_calls": [{}]}), "a call without a name"),
        (_called(ASKED, {"role": "assistant", "tool_calls": 5}), r"calls that are no list \(message 1: int\)"),
        (_called(ASKED, {"role": "assistant", "tool_calls": _call()}), r"calls that are no list \(message 1: dict\)"),
        (_called({**ASKED, "tool_calls": [_call()]}), "a call by another than the assistant"),
        (
            _called(ASKED, {"role": "assistant", "content": "x"}, tools=({"name": "f"},)),
            r"a tool without name or parameters \(tool 0: f\)",
        ),
    ],
)
def test_calls_that_cannot_be_written_are_named(tokenizer, row, message):
    with pytest.raises(Unusable, match=message):
        chat.encode(tokenizer, from_openai(row))


def test_tool_text_is_that_of_the_released_server():
    """Its prompts: system, questions and answers; there the tools stand in the last question that was answered."""
    compared = 0
    for case in _golden("react/messages.json")["parse_messages"]:
        if not case["functions"] or len(case["history"]) > 1:
            continue
        messages = [*case["messages"]]
        if messages[-1]["role"] == "user":
            messages.append({"role": "assistant", "content": "END"})
        row = {"messages": messages, "functions": case["functions"]}
        said = react.say(check(from_openai(row)), "openai_api")
        texts = [one.content for one in said if one.role != "system"]
        theirs = [text for turn in case["history"] for text in turn]
        if case["query"] is None:  # the server then asks the model to go on after "Thought:"
            theirs[-1] = theirs[-1].removesuffix("\nThought:")
        else:
            theirs.append(case["query"])
            assert texts.pop() == "Thought: I now know the final answer.\nFinal Answer: END"
        assert texts == theirs, case["name"]
        assert said[0].role != "system" or said[0].content == case["system"]
        compared += 1
    assert compared >= 5
