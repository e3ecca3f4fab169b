"""ReAct prompts and parsing: as the released programs and Qwen-Agent write and read them."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.agents import react
from qwen_jax.data import react as text
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden/react"
SEARCH = {"name": "search", "description": "Search the web.", "parameters": {"type": "object"}}
DRAW = {
    "name_for_model": "draw",
    "name_for_human": "文生图",
    "description_for_model": "画图",
    "parameters": [{"name": "prompt"}],
}
USER = {"role": "user", "content": "\nWho?\n "}
CALL = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "He.\n"}


@pytest.fixture(scope="module")
def react_chat():
    """Qwen-Agent's module of this name, without its package, which needs libraries for sound and search."""
    package = importlib.util.find_spec("qwen_agent")
    if package is None or not package.submodule_search_locations:
        pytest.skip("qwen-agent is not installed")

    class Message(dict):
        def __init__(self, role, content):
            super().__init__(role=role, content=content)

        content = property(lambda self: self["content"], lambda self, text: self.update(content=text))

    stubs = {
        "agents.fncall_agent": {"FnCallAgent": object},
        "llm": {"BaseChatModel": object},
        "llm.schema": {"ASSISTANT": "assistant", "DEFAULT_SYSTEM_MESSAGE": "", "Message": Message},
        "settings": {"MAX_LLM_CALL_PER_RUN": 8},
        "tools": {"BaseTool": object},
        "utils.utils": {
            "format_as_text_message": lambda message, **_: Message(message["role"], message["content"]),
            "merge_generate_cfgs": lambda **_: {},
        },
    }
    file = Path(package.submodule_search_locations[0]) / "agents/react_chat.py"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", "agents", "utils", *stubs):
            module = types.ModuleType(f"qwen_agent.{name}".rstrip("."))
            module.__dict__.update(stubs.get(name, {}), __path__=[])
            patch.setitem(sys.modules, module.__name__, module)
        spec = importlib.util.spec_from_file_location("qwen_agent_react_chat", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def golden(name: str) -> dict:
    if not (GOLDEN / name).is_file():
        pytest.skip(f"needs {name} of ../shared/golden/react")
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def turns(row: dict, **options) -> list[tuple[str, str]]:
    return [(one.role, one.content) for one in react.prompt(row, **options)]


def test_prompts_are_those_of_the_released_server():
    tokenizer = Tokenizer()
    for case in golden("messages.json")["parse_messages"]:
        said = react.prompt({"messages": case["messages"], "functions": case["functions"]}, "openai_api")
        texts = [one.content for one in said if one.role != "system"]
        system = said[0].content if said[0].role == "system" else "You are a helpful assistant."
        expected = [one for turn in case["history"] for one in turn]
        assert texts == expected + ([case["query"]] if case["query"] is not None else []), case["name"]
        assert system == case["system"]
        if case["query"] is None:
            ids = react.encode(tokenizer, said)
            assert ids == case["completion_ids"]
            assert tokenizer.decode(ids) == case["completion_prompt"]
            stops = [[tokenizer.im_end_id], *map(list, react.stop_sequences(tokenizer, "openai_api"))]
            assert stops == case["completion_stop_words_ids"]


def test_messages_that_the_released_server_refuses_are_refused():
    for case in golden("messages.json")["refused"]:
        row = {"messages": case["messages"], "functions": case["functions"]}
        with pytest.raises(ValueError) as refused:
            react.prompt(row, "openai_api")
        if "detail" in case:
            assert str(refused.value) == case["detail"].removeprefix("Invalid request: ")
        else:  # a KeyError there
            assert str(refused.value) == "a tool without name or parameters (tool 0: f)"


def test_replies_are_read_as_by_the_released_server():
    cases = golden("calls.json")
    for case in cases["parse_response"]:
        reply = react.parse(case["text"], rule="first")
        call = case["function_call"] or {"name": "", "arguments": ""}
        assert (reply.content, reply.name, reply.arguments) == (case["content"], call["name"], call["arguments"])
    for case in cases["add_extra_stop_words"]:
        assert react.add_bare(case["stop"]) == case["stop_words"]
    for case in cases["trim_stop_words"]:
        assert react.trim(case["text"], case["stop_words"]) == case["trimmed"]


TWO = "Thought: a\nAction: f\nAction Input: 1\nAction: g\nAction Input: 2"
WITH_RESULT = TWO.replace("1\n", "1\nObservation: 5\nThought: b\n")
# (text, rule, name, arguments, content); the first five are decisions of this project.
REPLIES = [
    ("Action: f\nAction Input: {}", "last", "", "", "Action: f\nAction Input: {}"),
    (TWO, "last", "g", "2", None),
    ("Thought: a\nAction: f\nAction Input: {\n  \"x\": 1\n}", "last", "f", '{\n  "x": 1\n}', "a"),
    ("Thought: a\nAction: f\nAction Input: {}", "last", "f", "{}", "a"),
    ("Thought: a\nAction Input: {}\nAction: f", "last", "", "", "Thought: a\nAction Input: {}\nAction: f"),
    (TWO, "first", "f", "1\nAction: g\nAction Input: 2", "a"),
    (WITH_RESULT, "first", "f", "1", "a"),
    (WITH_RESULT, "last", "g", "2", None),
    ("Thought: a\nObservation: 5\nAction: f\nAction Input: 1", "first", "f", "", None),
    ("Thought: a\nObservation: 5\nAction: f\nAction Input: 1", "last", "f", "1", None),
    ("Thought: a\nFinal Answer: 4\nAction: f\nAction Input: 1", "last", "f", "1", None),
    ("Thought: a\nFinal Answer: 4", "last", "", "", "4"),
    ("Hello!", "last", "", "", "Hello!"),
    ("Thought: a\nAction:\nAction Input: 1", "last", "", "", "Thought: a\nAction:\nAction Input: 1"),
    ("Thought:\nAction: f\nAction Input: ```py\n1\n```", "first", "f", "```py\n1\n```", "Thought:"),
    ("", "last", "", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "rule", "name", "arguments", "content"), REPLIES)
def test_replies_one_by_one(reply, rule, name, arguments, content):
    found = react.parse(reply, rule=rule)
    assert (found.name, found.arguments) == (name, arguments)
    assert content is None or found.content == content
    with pytest.raises(ValueError, match="last, first"):
        react.parse(reply, rule="middle")


PIECES = st.sampled_from(
    ["Thought: ", "Action:", "\nAction:", "\nAction Input:", "\nObservation:", "\nFinal Answer: ", "f", " ", "{}", "\n"]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join))
def test_the_rule_last_agrees_with_qwen_agent(react_chat, reply):
    found = react.parse(reply)
    _, name, arguments, before = react_chat.ReActChat._detect_tool(None, reply)
    if name:
        assert (found.name, found.arguments, found.before) == (name, arguments, before)
    else:  # there a call of a tool without a name is one
        assert (found.name, found.before) == ("", reply)


@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join))
def test_one_call_is_the_same_by_both_rules(reply):
    reply = f"Thought: a\nAction: f\nAction Input: {reply}"
    if reply.count("\nAction:") == reply.count("\nAction Input:") == 1 and reply.count("\nObservation:") < 2:
        assert react.parse(reply, "last") == react.parse(reply, "first")


def test_each_style_writes_its_own_words():
    found = {style: turns({"messages": [USER], "tools": [SEARCH, DRAW]}, style=style)[0][1] for style in text.STYLES}
    assert turns({"messages": [USER], "tools": [SEARCH, DRAW]}) == [("user", found["react_demo"])]
    for style, (tools, names, hint) in {
        "react_prompt": ("tools", "search,draw", " Format the arguments as a JSON object."),
        "react_demo": ("APIs", "search, draw", " Format the arguments as a JSON object."),
        "openai_api": ("APIs", "search, draw", ""),
        "qwen_agent": ("tools", "search,draw", " Format the arguments as a JSON object."),
    }.items():
        told = found[style]
        assert f"access to the following {tools}:\n\nsearch: Call this tool to interact with the search API." in told
        assert f"should be one of [{names}]\n" in told
        assert f'Search the web. Parameters: {{"type": "object"}}{hint}\n\ndraw: Call' in told
        assert told.endswith("Question: Who?\nThought: " if style == "qwen_agent" else "Question: Who?")
    assert "此工具的输入应为JSON对象。" in found["qwen_agent"] and "此" not in found["react_demo"]
    code = {**SEARCH, "args_format": "code"}
    assert "triple backticks" in turns({"messages": [USER], "tools": [code]})[0][1]
    with pytest.raises(ValueError, match="args_format of another style .search: 'xml' is not json or code"):
        turns({"messages": [USER], "tools": [{**SEARCH, "args_format": "xml"}]})


@pytest.mark.parametrize("style", [name for name in text.STYLES if name != "qwen_agent"])
def test_a_call_and_its_result_are_gone_on_from(style):
    (_, question), (role, turn) = turns({"messages": [USER, CALL, RESULT], "tools": [SEARCH]}, style=style)
    assert question.endswith("\n\nQuestion: Who?") and role == "assistant"
    assert turn == 'Thought: I look.\nAction: search\nAction Input: {"q": 1}\nObservation: He.\nThought:'
    older = [USER, {"role": "assistant", "content": "I look.", "function_call": CALL["tool_calls"][0]["function"]}]
    older += [{"role": "function", "name": "search", "content": "He."}]
    assert turns({"messages": older, "functions": [SEARCH]}, style=style)[1][1] == turn


@pytest.mark.parametrize(
    ("style", "place", "told"),
    [("openai_api", None, 1), ("react_demo", None, 1), ("react_prompt", None, 2), ("qwen_agent", None, 2)]
    + [("react_demo", "first", 0), ("react_demo", "asked", 2)],
)  # fmt: skip
def test_where_the_tools_stand_in_a_history(style, place, told):
    history = [USER, {"role": "assistant", "content": "A"}] * 2
    found = turns({"messages": [*history, USER], "tools": [SEARCH]}, style=style, place=place)
    questions = [content for role, content in found if role == "user"]
    assert [index for index, content in enumerate(questions) if "Begin!" in content] == [told]
    known = "A" if style == "qwen_agent" else "Thought: I now know the final answer.\nFinal Answer: A"
    assert [content for role, content in found if role == "assistant"] == [known] * 2
    alone = turns({"messages": [USER], "tools": [SEARCH]}, style=style, place=place)
    assert "Begin!" in alone[0][1]


def test_qwen_agents_prompts_are_those_of_its_own_agent(react_chat):
    """Its ReActChat, with a model that says what is written here, and what it was asked each time."""
    said, asked = iter(['I look.\nAction: search\nAction Input: {"q": 1}', "So.\nFinal Answer: He."]), []

    class Scripted(react_chat.ReActChat):
        def __init__(self):
            self.function_map = {"search": types.SimpleNamespace(name="search", function=tool)}

        def _call_llm(self, messages, **_):
            asked.append([(one["role"], one.content) for one in messages])
            yield [react_chat.Message(role="assistant", content=next(said))]

        def _call_tool(self, *_, **__):
            return "He."

    tool = {**SEARCH, "args_format": text.JSON_HINT}
    history = [("user", "Hi"), ("assistant", "Ahoy!"), ("user", "Who?")]
    list(Scripted()._run([react_chat.Message(role=role, content=content) for role, content in history]))
    messages = [{"role": role, "content": content} for role, content in history]
    for expected, more in zip(asked, ([], [CALL, {**RESULT, "content": "He."}]), strict=True):
        assert turns({"messages": [*messages, *more], "tools": [SEARCH]}, style="qwen_agent") == expected


def test_observations_are_stopped_at_by_text_and_by_ids():
    tokenizer = Tokenizer()
    sequences = react.stop_sequences(tokenizer)
    assert sequences == [(37763, 367, 25), (37763, 367, 510)]
    for tail in ("", " 5", "\nx"):
        said = f"Thought: a\nAction: f\nAction Input: {{}}\nObservation:{tail}"
        ids = tokenizer.encode(said)
        assert tokenizer.decode(ids[: react.stopped_at(ids, sequences)]) == said[: said.index("Observation:")]
        assert react.trim(said, react.stop_strings()) == said[: said.index("Observation:")]
    missed = tokenizer.encode("x Observation: 5")  # " Observation" is another token
    assert react.stopped_at(missed, sequences) == len(missed)
    assert react.trim("x Observation: 5", react.stop_strings()) == "x "


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one user message"),
        ([USER, RESULT], "role assistant before role function"),
        ([{"role": "assistant", "content": "x"}, USER], "role user before role assistant"),
        ([USER, {"role": "system", "content": "x"}], "a system message that is not first"),
        ([USER, {"role": "assistant", "content": "x"}], "the assistant speaks last"),
        ([USER, CALL], "a call without a result .message 1"),
        ([USER, CALL, USER], "a call without a result .message 2 follows the call of search"),
        ([USER, {"role": "assistant", "content": "x"}, RESULT], "a result without a call"),
    ],
)
def test_messages_that_nobody_can_go_on_from_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        react.prompt({"messages": messages, "tools": [SEARCH]})


def test_options_that_do_not_exist_are_named():
    row = {"messages": [USER], "tools": [SEARCH]}
    with pytest.raises(ValueError, match="react_prompt, react_demo, openai_api, qwen_agent"):
        react.prompt(row, "langchain")
    with pytest.raises(ValueError, match="first, answered, asked"):
        react.prompt(row, place="last")
    with pytest.raises(ValueError, match="'qwen_agent': it must be one of react_prompt, react_demo, openai_api"):
        text.say(from_openai(row), "qwen_agent")
