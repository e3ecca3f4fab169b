"""Completions in the ReAct form: parsing, stop words, and what a model goes on from (report 3.4).

`qwen_jax.data.react` writes the prompts; this module reads what a model answers. Two rules of the released programs
differ in which of several calls counts: the last one (examples/react_demo.py and Qwen-Agent), or the first one
(openai_api.py). A call is `\\nAction: NAME\\nAction Input: ARGUMENTS`, with both line ends: a text that begins with
`Action:` is no call by either rule.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from qwen_jax.data import chatml, react
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.react import DEFAULT_STYLE, Said
from qwen_jax.data.tokenizer import Tokenizer

RULES = ("last", "first")
# The rule of the program with the style's name; react_prompt.md has a parser in its FAQ.
RULE_OF_STYLE = {"react_prompt": "last", "react_demo": "last", "openai_api": "first", "qwen_agent": "last"}
DEFAULT_RULE = RULE_OF_STYLE[DEFAULT_STYLE]
STOP = "Observation:"
_ACTION, _INPUT, _OBSERVATION, _ANSWER = "\nAction:", "\nAction Input:", "\nObservation:", "\nFinal Answer: "


@dataclasses.dataclass(frozen=True)
class Reply:
    """A completion, taken apart.

    Attributes:
        name: of the tool that is called; "" if none is.
        arguments: text of the action input; "" if no tool is called.
        before: text before the call; the whole text if no tool is called.
    """

    name: str
    arguments: str
    before: str

    @property
    def thought(self) -> str:
        """What stands before the call, without `Thought: `; "" if no tool is called."""
        if not self.name:
            return ""
        place = self.before.find("Thought: ")
        return (self.before[place + len("Thought: ") :] if place >= 0 else self.before).strip()

    @property
    def answer(self) -> str:
        """Text after the last `Final Answer: `; all of it where there is none; "" if a tool is called."""
        if self.name:
            return ""
        place = self.before.rfind(_ANSWER)
        return self.before[place + len(_ANSWER) :] if place >= 0 else self.before

    @property
    def content(self) -> str:
        """`content` of the message in OpenAI's layout: the thought of a call, or the answer."""
        return self.thought if self.name else self.answer


def parse(text: str, rule: str = DEFAULT_RULE) -> Reply:
    """Takes a completion apart.

    As in the released programs, `Final Answer` followed by a call is a call, an action without an input and an input
    before its action are none, and arguments may have several lines. What follows the `Observation:` of a call is not
    read. By the rule "first", an `Observation:` before the call empties its arguments.

    Args:
        text: the whole turn of the assistant: where the model went on after `Thought:`, with that word.
        rule: "last" or "first", the call that counts.

    Raises:
        ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"the rule of parsing is {rule!r}: it must be one of {', '.join(RULES)}")
    find = text.rfind if rule == "last" else text.find
    action, given = find(_ACTION), find(_INPUT)
    if not 0 <= action < given:
        return Reply("", "", text)
    name = text[action + len(_ACTION) : given].strip()
    if not name:
        return Reply("", "", text)
    end = find(_OBSERVATION)
    if end < given:
        end = len(text) if rule == "last" or end < 0 else given
    return Reply(name, text[given + len(_INPUT) : end].strip(), text[:action])


def stop_strings(style: str = DEFAULT_STYLE) -> tuple[str, ...]:
    """The strings at which generation stops, so that the tool, not the model, writes the observation."""
    react.style_named(style)
    return (STOP,) if style == "openai_api" else (STOP, f"{STOP}\n")


def stop_sequences(tokenizer: Tokenizer, style: str = DEFAULT_STYLE) -> list[tuple[int, ...]]:
    """The same as token ids, for software that stops by them; in the released vocabulary 37763, 367 and 25 or 510.

    Strings find more: the ids miss `Observation:` where a token has its first or last letters with others.
    """
    return [tuple(tokenizer.encode(stop)) for stop in stop_strings(style)]


def stopped_at(ids: Sequence[int], sequences: Iterable[Sequence[int]]) -> int:
    """Number of ids before the first of the sequences; all of them where there is none."""
    ids = tuple(ids)
    found = [
        place
        for sequence in map(tuple, sequences)
        for place in range(len(ids) - len(sequence) + 1)
        if ids[place : place + len(sequence)] == sequence
    ]
    return min(found, default=len(ids))


def add_bare(stops: Sequence[str]) -> list[str]:
    """Stop strings, and those that begin with line ends without them, as openai_api.py adds them.

    A line end before `Observation:` may be part of another token, so that ids with it would never come.
    """
    bare = [stop.lstrip("\n") for stop in stops]
    return [*stops, *dict.fromkeys(one for one in bare if one and one not in stops)]


def trim(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop string that it has."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def prompt(row: Mapping, style: str = DEFAULT_STYLE, place: str | None = None) -> list[Said]:
    """The turns from which a model goes on, of a request in OpenAI's layout.

    Args:
        row: `messages`, with `tools` and `tool_calls` or, in the older layout, `functions` and `function_call`.
        style, place: see `qwen_jax.data.react.prompt`.

    Raises:
        ValueError: the messages cannot be answered, or a tool cannot be described; one line says why.
    """
    return react.prompt(from_openai(row), style, place)


def encode(tokenizer: Tokenizer, said: Sequence[Said], system: str = chatml.DEFAULT_SYSTEM) -> list[int]:
    """Token ids of these turns, up to where the model goes on: after the header of the assistant, or in its turn."""
    messages = [{"role": one.role, "content": one.content} for one in said]
    if messages[-1]["role"] != "assistant":
        return chatml.encode_prompt(tokenizer, messages, system)
    *before, last = chatml.turns(tokenizer, messages, system)
    return [token for turn in before for token in turn.ids] + [*last.header, *last.content]
