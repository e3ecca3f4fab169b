"""The text of a reply, as it comes, to content and at most one call of a tool.

A reply with tools is written in the ReAct form, of which a client sees the final answer, or the thought and the call.
What a piece of text will be is known late: a thought is held back until an answer or a call follows it, and a call
until it is whole. The pieces that are given out are, together, the same for every way the text may be cut.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.agents.react import parse
from qwen_jax.serving.prompts import ACTION, FINAL_ANSWER, THOUGHT
from qwen_jax.serving.tools import fits

_STARTS = (THOUGHT, ACTION.lstrip(), FINAL_ANSWER.lstrip())


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A whole call: a tool of the request, and the text of a JSON object that its schema allows."""

    name: str
    arguments: str


class Reply:
    """One reply.

    Args:
        opening: text before it that was written for the model, see `Prompt`.
        tools: JSON schema of the parameters, by name, of the tools that may be called; None: the text is plain.
    """

    def __init__(self, opening: str = "", tools: Mapping[str, Any] | None = None):
        self._opening, self._tools = opening, tools
        self._held = opening
        self._state = self._start if tools is not None else self._everything

    def feed(self, text: str) -> str:
        """The content that `text`, the next piece, makes certain."""
        self._held += text
        return self._advance(final=False)

    def finish(self, truncated: bool, held: bool = False) -> tuple[str, ToolCall | None]:
        """The rest of the content, after the last piece, and the call that the reply makes, if it makes one.

        Args:
            truncated: whether the reply ended because it was too long; then it makes no call.
            held: whether a constraint held it to a form in which arguments fit, to its end.
        """
        content = self._advance(final=True)
        call = None if truncated or self._state != self._call else self._whole_call(held)
        if call is not None:
            return content + self._thought(), call
        return content + self._rest(), None

    def _advance(self, final: bool) -> str:
        """Goes through the states until one needs more text; returns the content that they gave out."""
        content, before = "", None
        while self._state != before:
            before = self._state
            content += self._state(final)
        return content

    def _start(self, final: bool) -> str:
        begun = self._held.lstrip()
        if not final and any(mark != begun and mark.startswith(begun) for mark in _STARTS):
            return ""
        if begun.startswith(THOUGHT):
            self._state = self._reasoning
        elif begun.startswith(FINAL_ANSWER.lstrip()):
            self._held = begun[len(FINAL_ANSWER) - 1 :]
            self._state = self._before_answer
        elif begun.startswith(ACTION.lstrip()):
            self._state = self._call
        else:
            self._state = self._plain
        return ""

    def _reasoning(self, final: bool) -> str:
        action, answer = self._held.find(ACTION), self._held.find(FINAL_ANSWER)
        if 0 <= answer and (action < 0 or answer < action):
            self._held = self._held[answer + len(FINAL_ANSWER) :]
            self._state = self._before_answer
        elif action >= 0:
            self._state = self._call
        return ""

    def _plain(self, final: bool) -> str:
        action = self._held.find(ACTION)
        if action >= 0:
            self._state = self._call
            return self._give(action)
        held = 0 if final else max(n for n in range(len(ACTION)) if self._held.endswith(ACTION[:n]))
        return self._give(len(self._held) - held)

    def _before_answer(self, final: bool) -> str:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._everything
        return ""

    def _everything(self, final: bool) -> str:
        return self._give(len(self._held))

    def _call(self, final: bool) -> str:
        return ""

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given

    def _whole_call(self, held: bool) -> ToolCall | None:
        # The first call, as the released server has it: what follows it was written without its result.
        found = parse(self._held, rule="first")
        if self._tools is None or found.name not in self._tools:
            return None
        if not held and not fits(found.arguments, self._tools[found.name]):
            return None
        return ToolCall(found.name, found.arguments)

    def _thought(self) -> str:
        """What the model thought before its call."""
        thought = self._held[: self._held.find(ACTION)]
        return (
            thought[len(self._opening) :].strip() if self._opening else thought.lstrip().removeprefix(THOUGHT).strip()
        )

    def _rest(self) -> str:
        """What was held back and turned out to be neither a call nor before an answer."""
        answer = self._held.rfind(FINAL_ANSWER)
        if answer >= 0:
            return self._held[answer + len(FINAL_ANSWER) :].lstrip()
        return self._held[len(self._opening) :].lstrip() if self._held.startswith(self._opening or "\0") else self._held
