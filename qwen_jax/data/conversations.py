"""Conversations as people have them in files: OpenAI's `messages`, ShareGPT's layout, and questions with an answer.

A row that has the fields of its layout and still cannot be trained on raises `Unusable`, with one of few reasons, so
that rows can be left out and counted by reason. Other mistakes in a row are a plain `ValueError`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from qwen_jax.data.content import Content, Part, Unusable, parse_parts

ROLES = ("system", "user", "assistant", "tool")
# Names in files to `ROLES`. `function` and `observation` are the results of tools.
_OPENAI = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Names of question and answer: GSM8K, MATH, MetaMathQA and Math401, Alpaca and MathInstruct, messages of one turn.
_QUESTIONS = (
    ("question", "answer"),
    ("problem", "solution"),
    ("query", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool: its name, and its arguments as text (JSON, as a rule). `id` is "" where the file has none."""

    name: str
    arguments: str
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        calls: those of the assistant.
        answers: id of the call that a tool's result is for.
        parts: texts, pictures and regions; where there are any, they are the content, and `content` is "".
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    answers: str = ""
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, oldest first, and the definitions of the tools that the assistant may call, as the file has them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping, ...] = ()


def from_openai(row: Mapping, read: "Reader | None" = None) -> Conversation:
    """Reads `{"messages": [{"role", "content", "tool_calls"…}, …], "tools": […]}`.

    Content is text, null, or a list of text parts. Tools and calls have the layout of OpenAI's chat completions, with
    `tool_calls`, or the older one with `functions` and `function_call`; arguments may be an object instead of text.

    Args:
        read: reader of the content of a message, such as `read_parts`; by default `text_of`.

    Raises:
        Unusable: see `check`; or content that `read` refuses, such as a picture.
        ValueError: the row has no list `messages`, or a message is no object.
    """
    return _conversation(row, "messages", "role", "content", _OPENAI, read)


def from_sharegpt(row: Mapping, read: "Reader | None" = None) -> Conversation:
    """Reads `{"conversations": [{"from", "value"}, …], "system": …, "tools": …}`; the last two are optional.

    `from` is human, gpt, system, tool, function or observation (also user and assistant). The value of
    `function_call` is a JSON object with name and arguments. `tools` is a list, or one as JSON text.

    Args:
        read: as of `from_openai`.

    Raises:
        Unusable, ValueError: as `from_openai`.
    """
    result = _conversation(row, "conversations", "from", "value", _SHAREGPT, read)
    system = row.get("system")
    if isinstance(system, str) and system:
        if result.messages[:1] and result.messages[0].role == "system":
            raise Unusable("two system messages", "one is the field `system`")
        result = dataclasses.replace(result, messages=(Message("system", system), *result.messages))
    return result


def from_question(row: Mapping) -> Conversation:
    """Reads a question and its answer: one turn of the user, one of the assistant.

    The fields are `question` and `answer`, `problem` and `solution`, `query` and `response`, `instruction` and
    `output`, or `prompt` and `completion`. A text `input` stands a line below the question, and `system` before it.

    Raises:
        Unusable: see `check`; or content that is no text.
        ValueError: the row has none of these pairs.
    """
    pairs = [pair for pair in _QUESTIONS if isinstance(row, Mapping) and set(pair) <= set(row)]
    if not pairs:
        found = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
        expected = ", ".join(" and ".join(pair) for pair in _QUESTIONS)
        raise ValueError(f"expected a question and an answer ({expected}), found {found or 'no field'}")
    question, answer = (text_of(row[field], field) for field in pairs[0])
    given, system = text_of(row.get("input"), "input"), text_of(row.get("system"), "system")
    if given:
        question = f"{question}\n{given}"
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation((Message("system", system), *turns) if system else turns)


def check(conversation: Conversation) -> Conversation:
    """Returns `conversation`.

    Raises:
        Unusable: no message, a system message that is not the first, a turn without content, an assistant that speaks
            first or never, a result without a call, a call whose result is missing before the next turn, or a picture
            beside tools, which the released models do not know together.
    """
    messages = conversation.messages
    if not messages:
        raise Unusable("empty conversation")
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            first = messages[0].role == "system"
            raise Unusable("two system messages" if first else "a system message that is not first", f"message {index}")
        if message.role in ("user", "assistant") and not (message.content or message.parts or message.calls):
            raise Unusable(f"empty turn of the {message.role}", f"message {index}")
        if message.parts and (conversation.tools or message.calls or message.role == "tool"):
            raise Unusable("pictures or regions in a conversation with tools", f"message {index}")
    spoken = [message.role for message in messages if message.role != "system"]
    if spoken[:1] == ["assistant"]:
        raise Unusable("the assistant speaks first")
    if "assistant" not in spoken:
        raise Unusable("no turn of the assistant")
    _check_calls(messages, {tool_name(tool) for tool in conversation.tools})
    return conversation


def check_prompt(conversation: Conversation) -> Conversation:
    """Returns `conversation`, which a model goes on from: it ends with the user, or with the results of all calls.

    Calls may be of tools that are not listed any more.

    Raises:
        Unusable: nobody asks, a system message that is not the first, an assistant or a tool that speaks before the
            user, a result without a call, a call without a result, or an assistant that speaks last.
    """
    messages = conversation.messages
    if all(message.role != "user" for message in messages):
        raise Unusable("Expecting at least one user message.")
    for index, message in enumerate(messages):
        before = messages[index - 1].role if index else ""
        if message.role == "system" and index:
            raise Unusable("a system message that is not first", f"message {index}")
        if message.role == "tool" and before not in ("assistant", "tool"):
            raise Unusable("Expecting role assistant before role function.")
        if message.role == "assistant" and before in ("", "system"):
            raise Unusable("Expecting role user before role assistant.")
    _check_calls(messages, None)
    if messages[-1].role == "assistant":
        missing = "a call without a result" if messages[-1].calls else "the assistant speaks last"
        raise Unusable(missing, f"message {len(messages) - 1}: a model answers the user or goes on from a result")
    return conversation


def _check_calls(messages: Sequence[Message], tools: set[str] | None) -> None:
    """Whether calls have results; and whether they are of `tools`, if given."""
    open_calls: list[Call] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            if not open_calls:
                raise Unusable("a result without a call", f"message {index}")
            open_calls.remove(answered(open_calls, message, index))
        elif open_calls:
            raise Unusable("a call without a result", f"message {index} follows the call of {open_calls[0].name}")
        for call in message.calls:
            if tools is not None and call.name not in tools:
                listed = ", ".join(sorted(tools)) or "none"
                raise Unusable("a call of an unknown tool", f"message {index}: {call.name}; listed are {listed}")
        open_calls.extend(message.calls)
    if len(open_calls) > 1 and messages[-1].calls:
        raise Unusable("several calls without results", f"{len(open_calls)} in the last message")


def answered(calls: Sequence[Call], message: Message, index: int) -> Call:
    """The call that a result is for: that of its id, or the first one where the file gives none."""
    if not message.answers or not any(call.id for call in calls):
        return calls[0]
    for call in calls:
        if call.id == message.answers:
            return call
    raise Unusable("a result without a call", f"message {index}: id {message.answers!r}")


def tool_name(tool: Mapping) -> str:
    """Name by which the model calls a tool; "" where its definition has none."""
    definition = tool_definition(tool)
    return str(definition.get("name_for_model", definition.get("name", "")))


def tool_definition(tool: Mapping) -> Mapping:
    """The object with name and parameters: OpenAI's newer layout has it under `function`."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


# Content of a message and its place, to text or parts.
Reader = Callable[[object, str], Content]


def _conversation(
    row: Mapping, field: str, role_key: str, text_key: str, roles: Mapping[str, str], read: Reader | None
) -> Conversation:
    if isinstance(row, Mapping) and field in row and row[field] is None:
        raise Unusable("empty conversation", f"{field} is null")
    if not isinstance(row, Mapping) or not isinstance(row.get(field), list):
        found = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"expected an object with a list {field!r}, found {found or 'no field'}")
    read = read or text_of
    messages = tuple(_message(one, index, role_key, text_key, roles, read) for index, one in enumerate(row[field]))
    return Conversation(messages, _tools(row))


def _message(one: object, index: int, role_key: str, text_key: str, roles: Mapping[str, str], read: Reader) -> Message:
    if not isinstance(one, Mapping):
        raise ValueError(f"message {index}: expected an object, found {type(one).__name__}")
    name = one.get(role_key)
    if not isinstance(name, str) or name not in roles:
        raise Unusable("unknown role", f"message {index}: {name!r} is none of {', '.join(roles)}")
    given = read(one.get(text_key), f"message {index}")
    content, parts = (given, ()) if isinstance(given, str) else ("", tuple(given))
    if name == "function_call":
        return Message("assistant", "", (_call(_json(content, f"message {index}"), index),))
    asked = one.get("tool_calls") or ([one["function_call"]] if one.get("function_call") else [])
    if not isinstance(asked, list | tuple):
        raise Unusable("calls that are no list", f"message {index}: {type(asked).__name__}")
    if asked and roles[name] != "assistant":
        raise Unusable("a call by another than the assistant", f"message {index}: {name}")
    calls = tuple(_call(call, index) for call in asked)
    return Message(roles[name], content, calls, str(one.get("tool_call_id") or ""), parts)


def read_parts(content: object, where: str) -> Content:
    """Content that may hold pictures and regions: as `text_of`, or the parts of a list (`content.parse_parts`).

    Raises:
        Unusable: as these two.
    """
    if not isinstance(content, list):
        return text_of(content, where)
    parts = parse_parts(content, where)
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def text_of(content: object, where: str) -> str:
    """Text of a message: a string, null (empty), or the parts of type `text` joined as they stand.

    Raises:
        Unusable: a part is no text, or `content` is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if isinstance(text, str))
    raise Unusable("content that is no text", where)


def _call(given: object, index: int) -> Call:
    inner = given.get("function", given) if isinstance(given, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(inner, Mapping) or not isinstance(name, str):
        raise Unusable("a call without a name", f"message {index}")
    arguments = inner.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return Call(name, arguments, str(given.get("id") or ""))


def _tools(row: Mapping) -> tuple[Mapping, ...]:
    tools = row.get("tools") or row.get("functions") or []
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("expected a list of objects in 'tools'")
    return tuple(tools)


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unusable("a call or a tool that is not JSON", f"{where}: {error}") from error
