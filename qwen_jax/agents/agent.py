"""An agent: a model that calls tools until it answers, over anything that completes text.

The model is a function of turns and stop strings that yields text (`Complete`): an engine in this process, a server of
OpenAI's protocol, or three lines of a test. After each call the prompt is written anew from the messages so far, by the
same code that writes conversations to train on (`qwen_jax.data.react`): what a tool or a user wrote is quoted and never
parsed, and a saved transcript trains on exactly what the model saw.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.agents import react
from qwen_jax.agents.tools import Tools
from qwen_jax.data import chatml
from qwen_jax.data.react import DEFAULT_STYLE, PLACES, Said, style_named
from qwen_jax.inference.text import TextStream

# Turns (the last one is the user's, or one of the assistant to be continued) and stop strings to pieces of text. Text
# from a stop string on is dropped here, so that a model may ignore them.
Complete = Callable[[Sequence[Said], Sequence[str]], Iterable[str]]
ANSWERED, MOST_CALLS, REPEATED, FAILED = "answered", "most_calls", "repeated", "failed"


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happens.

    Attributes:
        kind: "text" (a piece of what the model says), "call" (a tool is called), "observation" (its result), "end".
        text: the piece, the action input, the result; of an end, the reason: "answered", "most_calls", "repeated" or
            "failed".
        name: of the tool.
        failed: of an observation, whether it is an error.
    """

    kind: str
    text: str
    name: str = ""
    failed: bool = False


@dataclasses.dataclass
class Transcript:
    """A conversation so far.

    Attributes:
        messages: in OpenAI's layout; messages of the assistant keep the form in which the model wrote them.
        tools: definitions.
        ended: why the last run ended; see `Event`. "" while it goes on.
        problem: of a run that ended without an answer, what went wrong.
        answer: the final answer, without the thought before it; "" without one.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping]
    ended: str = ""
    problem: str = ""
    answer: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """The conversation as a row that the task `chat_messages` reads; `ended` beside it."""
        return {"messages": self.messages, "tools": list(self.tools), "ended": self.ended}

    def save(self, path: str | Path) -> None:
        """Adds the row to a file of JSON lines, which appears whole or not at all.

        Raises:
            OSError, ValueError: the file cannot be read or written, or does not end with a line end.
        """
        path = files.as_path(path)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not before.endswith("\n"):
            raise ValueError(f"{path}: does not end with a line end: is it a file of JSON lines?")
        files.write_text(path, before + files.json_line(self.row))


class Agent:
    """Answers questions with tools.

    Attributes:
        tools: that the model may call.
    """

    def __init__(
        self,
        complete: Complete,
        tools: Tools,
        *,
        system: str = chatml.DEFAULT_SYSTEM,
        style: str = DEFAULT_STYLE,
        rule: str | None = None,
        place: str = "first",
        most_calls: int = 8,
        most_repeats: int = 3,
    ):
        """Prepares an agent.

        Args:
            complete: the model.
            tools: that it may call.
            system: system message.
            style: of the prompts, a key of `qwen_jax.data.react.STYLES`.
            rule: which of several calls counts, see `react.parse`; None: as the program with the style's name.
            place: of the descriptions in a conversation of several questions, see `qwen_jax.data.react.PLACES`. The
                default is that of training here; the released programs have others.
            most_calls: the largest number of calls of the model for one question.
            most_repeats: the same tool with the same action input so many times in a row ends the run.

        Raises:
            ValueError: no such style, rule or place, or a number out of range.
        """
        style_named(style)
        react.parse("", rule or react.RULE_OF_STYLE[style])
        if place not in PLACES:
            raise ValueError(f"place is {place!r}: it must be one of {', '.join(PLACES)}")
        if most_calls < 1 or most_repeats < 2:
            raise ValueError(f"most_calls must be at least 1 and most_repeats 2, found {most_calls} and {most_repeats}")
        self.tools = tools
        self._complete, self._system = complete, system
        self._style, self._rule, self._place = style, rule or react.RULE_OF_STYLE[style], place
        self._most_calls, self._most_repeats = most_calls, most_repeats

    def begin(self) -> Transcript:
        """An empty conversation."""
        return Transcript([{"role": "system", "content": self._system}], self.tools.definitions)

    def run(self, question: str, transcript: Transcript) -> Iterator[Event]:
        """Answers a question; `transcript` grows with it.

        A run that is closed early, or that fails, leaves what was whole before.

        Raises:
            Exception: of the model.
        """
        transcript.ended, transcript.problem, transcript.answer = "", "", ""
        transcript.messages.append({"role": "user", "content": question})
        calls: list[tuple[str, str]] = []
        for _ in range(self._most_calls):
            try:
                said = react.prompt(transcript.row, self._style, self._place)
                text = yield from self._said(said)
            except ValueError as error:  # no room left in the context, as a rule, or a reply that was cut
                yield _end(transcript, FAILED, str(error))
                return
            reply = react.parse(text, self._rule)
            if not reply.name:
                transcript.messages.append({"role": "assistant", "content": text})
                transcript.answer = reply.answer.strip()
                yield _end(transcript, ANSWERED)
                return
            calls.append((reply.name, reply.arguments))
            if calls[-self._most_repeats :] == [calls[-1]] * self._most_repeats:
                yield _end(transcript, REPEATED, f"{reply.name} was called {self._most_repeats} times with the same")
                return
            yield Event("call", reply.arguments, reply.name)
            outcome = self.tools.call(reply.name, reply.arguments)
            number = f"call_{len(transcript.messages)}"
            function = {"name": reply.name, "arguments": reply.arguments}
            made = {"id": number, "type": "function", "function": function}
            transcript.messages += [
                {"role": "assistant", "content": reply.before, "tool_calls": [made]},
                {"role": "tool", "tool_call_id": number, "content": outcome.text},
            ]
            yield Event("observation", outcome.text, reply.name, outcome.failed)
        yield _end(transcript, MOST_CALLS, f"the model was called {self._most_calls} times")

    def _said(self, said: Sequence[Said]) -> Generator[Event, None, str]:
        """Yields what the model says; returns the whole of its turn since the last observation."""
        stops = react.stop_strings(self._style)
        # A turn that goes on does so after "Thought:".
        text = "Thought:" if said[-1].role == "assistant" else ""
        if style_named(self._style).in_question and self.tools.definitions:
            text = "Thought: "
        stream = TextStream(stops)  # holds back what may become a stop string
        with contextlib.closing(_iterator(self._complete(said, stops))) as pieces:
            for piece in pieces:
                if given := stream.feed(piece.encode("utf-8", "surrogatepass")):
                    yield Event("text", given)
                if stream.stopped:
                    break
        if given := stream.finish():
            yield Event("text", given)
        return text + stream.text


def _iterator(pieces: Iterable[str]) -> Generator[str]:
    """Pieces that can be closed; a string is one piece."""
    yield from [pieces] if isinstance(pieces, str) else pieces


def _end(transcript: Transcript, reason: str, problem: str = "") -> Event:
    transcript.ended, transcript.problem = reason, problem
    return Event("end", reason)
