"""Tool calls as text, in the ReAct form that the released chat models were trained with (report 3.4).

ChatML of the first Qwen has no role for tools. A question with tools is asked after their descriptions, and calls,
results and the final answer are one turn of the assistant:

    Thought: … / Action: NAME / Action Input: ARGUMENTS / Observation: RESULT / Thought: … / Final Answer: …

Four released programs write the descriptions, each a little differently: `STYLES`. `say` writes whole conversations, to
train on; `prompt` writes what the model goes on from. As in the released examples for fine-tuning, `say` puts the
descriptions before the first question; with a history, the programs put them elsewhere (`PLACES`).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from qwen_jax.data.content import Part
from qwen_jax.data.conversations import (
    Call,
    Conversation,
    Message,
    Unusable,
    answered,
    check_prompt,
    tool_definition,
    tool_name,
)

KNOWN = "Thought: I now know the final answer."
JSON_HINT = "Format the arguments as a JSON object."
_CODE_HINT = "Enclose the code within triple backticks (`) at the beginning and end of the code."
_CHINESE_HINT = "此工具的输入应为JSON对象。"
# Questions before which a prompt has the descriptions: the first one; the last one that was answered, or the only one;
# the one that is asked now.
PLACES = ("first", "answered", "asked")


@dataclasses.dataclass(frozen=True)
class Style:
    """How one released program writes prompts.

    Attributes:
        tools: what it calls the tools.
        separator: between their names.
        hint: sentence after the parameters: "always" `JSON_HINT`, "by_tool" by the tool's `args_format` ("json" or
            "code"), "text" the tool's `args_format` itself, "never" none.
        place: one of `PLACES`, for prompts with a history.
        in_question: whether the steps so far stand in the user's turn, after the question, and not in the assistant's.
    """

    tools: str
    separator: str
    hint: str
    place: str
    in_question: bool = False


STYLES = {
    "react_prompt": Style("tools", ",", "always", "asked"),  # QwenLM/Qwen examples/react_prompt.md
    "react_demo": Style("APIs", ", ", "by_tool", "answered"),  # examples/react_demo.py
    "openai_api": Style("APIs", ", ", "never", "answered"),  # openai_api.py
    "qwen_agent": Style("tools", ",", "text", "asked", in_question=True),  # Qwen-Agent ReActChat
}
DEFAULT_STYLE = "react_demo"
# `say` has the others: Qwen-Agent's prompts hold what the model said in the user's turn, where nothing is learned.
TRAINED_STYLES = tuple(name for name, style in STYLES.items() if not style.in_question)


@dataclasses.dataclass(frozen=True)
class Said:
    """One turn of ChatML.

    Attributes:
        role: system, user or assistant.
        content: its text.
        foreign: (start, stop) of the characters of `content` that a tool wrote, not the assistant.
        finished: whether the assistant ends the turn; False where a tool's result, or what follows it, is missing.
        parts: as of `conversations.Message`; only where the conversation has no tools.
    """

    role: str
    content: str
    foreign: tuple[tuple[int, int], ...] = ()
    finished: bool = True
    parts: tuple[Part, ...] = ()


def say(conversation: Conversation, style: str = DEFAULT_STYLE) -> list[Said]:
    """The turns of a conversation that passes `conversations.check`.

    Without tools, they are its messages as they stand. With tools, line ends before and blanks after a message are
    taken away, as the released programs do.

    Args:
        style: one of `TRAINED_STYLES`.

    Raises:
        Unusable: a tool has no name or no parameters, or an `args_format` that the style does not know.
        ValueError: another style.
    """
    if style not in TRAINED_STYLES:
        raise ValueError(f"the style of tools is {style!r}: it must be one of {', '.join(TRAINED_STYLES)}")
    if not conversation.tools:
        return [Said(message.role, message.content, parts=message.parts) for message in conversation.messages]
    return _turns(conversation, instructions(conversation.tools, style), "first")


def prompt(conversation: Conversation, style: str = DEFAULT_STYLE, place: str | None = None) -> list[Said]:
    """The turns from which the model goes on: the last one is the user's, or one of the assistant to be continued.

    After the result of a tool, that turn ends with `Thought:`. Line ends before and blanks after a message are taken
    away, with tools and without.

    Args:
        conversation: ends with the user, or with the results of all calls.
        style: a key of `STYLES`.
        place: one of `PLACES`; None: that of the style.

    Raises:
        Unusable: see `conversations.check_prompt` and `instructions`.
        ValueError: another style or place.
    """
    rules = style_named(style)
    place = place or rules.place
    if place not in PLACES:
        raise ValueError(f"place is {place!r}: it must be one of {', '.join(PLACES)}")
    check_prompt(conversation)
    if not rules.in_question or not conversation.tools:
        said = _turns(conversation, instructions(conversation.tools, style) if conversation.tools else "", place)
        if said[-1].role == "assistant":
            said[-1] = dataclasses.replace(said[-1], content=f"{said[-1].content}\nThought:", finished=False)
        return said
    asked = max(index for index, message in enumerate(conversation.messages) if message.role == "user")
    before = dataclasses.replace(conversation, messages=conversation.messages[: asked + 1], tools=())
    *earlier, question = _turns(before, "", place)
    whole = f"{instructions(conversation.tools, style)}\n\nQuestion: {question.content}\nThought: "
    return [*earlier, Said("user", whole + _in_question(conversation.messages[asked + 1 :]))]


def style_named(style: str) -> Style:
    """A style of `STYLES`.

    Raises:
        ValueError: there is none of this name.
    """
    if style not in STYLES:
        raise ValueError(f"the style of tools is {style!r}: it must be one of {', '.join(STYLES)}")
    return STYLES[style]


def instructions(tools: Sequence[Mapping], style: str = DEFAULT_STYLE) -> str:
    """The text that describes tools and the form of an answer, before `Question:`.

    Raises:
        Unusable: a tool has no name or no parameters, or an `args_format` that the style does not know.
        ValueError: there is no such style.
    """
    rules = style_named(style)
    described, names = [], []
    for index, tool in enumerate(tools):
        definition, name = tool_definition(tool), tool_name(tool)
        if not name or "parameters" not in definition:
            raise Unusable("a tool without name or parameters", f"tool {index}: {name or 'no name'}")
        shown = definition.get("name_for_human", definition.get("name", name))
        description = definition.get("description_for_model", definition.get("description", ""))
        parameters = json.dumps(definition["parameters"], ensure_ascii=False)
        text = (
            f"{name}: Call this tool to interact with the {shown} API. What is the {shown} API useful for? "
            f"{description} Parameters: {parameters}"
        )
        hint = _hint(rules, definition)
        described.append(f"{text} {hint}" if hint else text)
        names.append(name)
    return "\n\n".join(
        [
            f"Answer the following questions as best you can. You have access to the following {rules.tools}:",
            *described,
            "Use the following format:",
            "Question: the input question you must answer\n"
            "Thought: you should always think about what to do\n"
            f"Action: the action to take, should be one of [{rules.separator.join(names)}]\n"
            "Action Input: the input to the action\n"
            "Observation: the result of the action\n"
            "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
            "Thought: I now know the final answer\n"
            "Final Answer: the final answer to the original input question",
            "Begin!",
        ]
    )


def _hint(rules: Style, definition: Mapping) -> str:
    """The sentence that says how arguments are written, or ""."""
    given = definition.get("args_format")
    if rules.hint == "always":
        return JSON_HINT
    if rules.hint == "text":
        chinese = re.search("[\u4e00-\u9fff]", json.dumps(definition, ensure_ascii=False))
        return str(given) if given is not None else _CHINESE_HINT if chinese else JSON_HINT
    if rules.hint == "by_tool":
        hints = {"json": JSON_HINT, "code": _CODE_HINT}
        if given is not None and given not in hints:
            raise Unusable("an args_format of another style", f"{tool_name(definition)}: {given!r} is not json or code")
        return hints[given or "json"]
    return ""


def _turns(conversation: Conversation, instruction: str, place: str) -> list[Said]:
    """The turns of a conversation, with the instruction, if there is one, before the question of `place`."""
    messages = conversation.messages
    questions = [index for index, message in enumerate(messages) if message.role == "user"]
    told = questions[0] if place == "first" else questions[-1]
    if place == "answered" and messages[-1].role == "user" and len(questions) > 1:
        told = questions[-2]
    said: list[Said] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        if message.role in ("system", "user"):
            content = _strip(message.content)
            if index == told and instruction:
                content = f"{instruction}\n\nQuestion: {content}"
            said.append(Said(message.role, content))
            index += 1
            continue
        stop = index
        while stop < len(messages) and messages[stop].role in ("assistant", "tool"):
            stop += 1
        said.append(_turn(messages[index:stop], bool(conversation.tools)))
        index = stop
    return said


def _turn(messages: Sequence[Message], tools: bool) -> Said:
    """One turn from messages of the assistant and of tools."""
    parts: list[tuple[str, bool]] = []  # (text, whether a tool wrote it)
    finished = True
    for index, message in enumerate(messages):
        if message.role == "tool":
            continue  # with its call
        content = _strip(message.content)
        start = "\n" if parts else ""
        if not message.calls:
            # A reply that a model wrote in the form has a thought of its own.
            if tools and not content.startswith("Thought:"):
                content = f"{KNOWN}\nFinal Answer: {content}"
            parts.append((start + content, False))
            finished = True
        for call, result in _results(message.calls, messages[index + 1 :]):
            # A further call of the same message has no thought of its own, as a released call without content.
            thought = content if content.startswith("Thought:") else f"Thought: {content}"
            parts.append(
                (f"{start}{thought}\nAction: {call.name}\nAction Input: {call.arguments}\nObservation:", False)
            )
            if result is not None:
                parts.append((f" {_strip(result)}", True))
            start, content, finished = "\n", "", False
    text, foreign = "", []
    for part, by_tool in parts:
        if by_tool:
            foreign.append((len(text), len(text) + len(part)))
        text += part
    return Said("assistant", text, tuple(foreign), finished)


def _in_question(messages: Sequence[Message]) -> str:
    """Calls and results after a question, as Qwen-Agent writes them into the user's turn."""
    text = ""
    for index, message in enumerate(messages):
        thought = _strip(message.content).removeprefix("Thought:").removeprefix(" ")
        for call, result in _results(message.calls, messages[index + 1 :]):
            code = "\n" if call.arguments.startswith("```") else ""
            text += f"{thought}\nAction: {call.name}\nAction Input: {code}{call.arguments}"
            text += f"\nObservation: {result}\nThought: "
            thought = ""
    return text


def _results(calls: Sequence[Call], following: Sequence[Message]) -> list[tuple[Call, str | None]]:
    """Each call with its result, which is None where the conversation ends before it."""
    results: dict[int, str] = {}
    waiting = list(calls)
    for index, message in enumerate(following):
        if message.role != "tool" or not waiting:
            break
        call = answered(waiting, message, index)
        results[id(call)] = message.content
        waiting = [one for one in waiting if one is not call]
    return [(call, results.get(id(call))) for call in calls]


def _strip(text: str) -> str:
    return text.lstrip("\n").rstrip()
