"""Tool calls as text, in the ReAct form that the released chat models were trained with (report 3.4).

ChatML of the first Qwen has no role for tools. As in the released `openai_api.py`, a question with tools is asked after
their descriptions, and calls, results and the final answer are one turn of the assistant:

    Thought: … / Action: NAME / Action Input: ARGUMENTS / Observation: RESULT / Thought: … / Final Answer: …

Two things differ from that program, which serves, as they do in the released examples for fine-tuning: the descriptions
stand before the first question, not before the last one that was answered, and the final turn is whole.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from qwen_jax.data.conversations import Call, Conversation, Message, Unusable, answered, tool_definition, tool_name

KNOWN = "Thought: I now know the final answer."


@dataclasses.dataclass(frozen=True)
class Said:
    """One turn of ChatML.

    Attributes:
        role: system, user or assistant.
        content: its text.
        foreign: (start, stop) of the characters of `content` that a tool wrote, not the assistant.
        finished: whether the assistant ends the turn; False where a tool's result, or what follows it, is missing.
    """

    role: str
    content: str
    foreign: tuple[tuple[int, int], ...] = ()
    finished: bool = True


def say(conversation: Conversation) -> list[Said]:
    """The turns of a conversation that passes `conversations.check`.

    Without tools, they are its messages as they stand. With tools, line ends before and blanks after a message are
    taken away, as the released program does.

    Raises:
        Unusable: a tool has no name or no parameters.
    """
    if not conversation.tools:
        return [Said(message.role, message.content) for message in conversation.messages]
    said: list[Said] = []
    instruction = instructions(conversation.tools)
    messages = conversation.messages
    index = 0
    while index < len(messages):
        message = messages[index]
        if message.role in ("system", "user"):
            content = _strip(message.content)
            if message.role == "user" and instruction:
                content, instruction = f"{instruction}\n\nQuestion: {content}", ""
            said.append(Said(message.role, content))
            index += 1
            continue
        stop = index
        while stop < len(messages) and messages[stop].role in ("assistant", "tool"):
            stop += 1
        said.append(_turn(messages[index:stop]))
        index = stop
    return said


def instructions(tools: Sequence[Mapping]) -> str:
    """The text that describes tools and the form of an answer, before `Question:`.

    Raises:
        Unusable: a tool has no name or no parameters.
    """
    described, names = [], []
    for index, tool in enumerate(tools):
        definition, name = tool_definition(tool), tool_name(tool)
        if not name or "parameters" not in definition:
            raise Unusable("a tool without name or parameters", f"tool {index}: {name or 'no name'}")
        shown = definition.get("name_for_human", definition.get("name", name))
        description = definition.get("description_for_model", definition.get("description", ""))
        parameters = json.dumps(definition["parameters"], ensure_ascii=False)
        described.append(
            f"{name}: Call this tool to interact with the {shown} API. What is the {shown} API useful for? "
            f"{description} Parameters: {parameters}"
        )
        names.append(name)
    return "\n\n".join(
        [
            "Answer the following questions as best you can. You have access to the following APIs:",
            *described,
            "Use the following format:",
            "Question: the input question you must answer\n"
            "Thought: you should always think about what to do\n"
            f"Action: the action to take, should be one of [{', '.join(names)}]\n"
            "Action Input: the input to the action\n"
            "Observation: the result of the action\n"
            "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
            "Thought: I now know the final answer\n"
            "Final Answer: the final answer to the original input question",
            "Begin!",
        ]
    )


def _turn(messages: Sequence[Message]) -> Said:
    """One turn from messages of the assistant and of tools."""
    parts: list[tuple[str, bool]] = []  # (text, whether a tool wrote it)
    finished = True
    for index, message in enumerate(messages):
        if message.role == "tool":
            continue  # with its call
        content = _strip(message.content)
        start = "\n" if parts else ""
        if not message.calls:
            parts.append((f"{start}{KNOWN}\nFinal Answer: {content}", False))
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
