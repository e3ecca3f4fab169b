"""Comparisons of two answers to one prompt, for preference models, reward models and DPO (report 3.2.1).

`LAYOUTS` names how publishers lay them out:

    pairs       `prompt` (text or messages) or `messages`, `chosen` and `rejected` (text, a message, or messages)
    hh_rlhf     Anthropic's hh-rlhf: two transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:"
    shp         Stanford SHP: `history`, `human_ref_A`, `human_ref_B`, `labels` (1: A is better)
    summaries   OpenAI's summarize-from-feedback comparisons: `info`, two `summaries`, `choice`

A pair becomes two segments, the chosen side first. Each side holds the whole conversation in ChatML and ends at the
`<|im_end|>` of its answer; loss is on the tokens of the answer and on that `<|im_end|>`, where a reward is read.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwen_jax.data import chatml, react
from qwen_jax.data.chat import Encoded
from qwen_jax.data.conversations import Conversation, Message, Unusable, check, from_openai, text_of
from qwen_jax.data.tokenizer import Tokenizer

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(f"({_HUMAN}|{_ASSISTANT})")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, which ends with a message of the user, and two answers to it."""

    prompt: Conversation
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class PairRows:
    """How the rows of comparison files become examples (`qwen_jax.data.records`).

    Attributes:
        layout: a key of `LAYOUTS`.
        system: system message of a prompt without one.
        min_score_ratio: least `score_ratio` of an SHP pair; its authors advise 2 and more.
    """

    layout: str = "pairs"
    system: str = chatml.DEFAULT_SYSTEM
    min_score_ratio: float = 1.0

    def group(self, row: Mapping) -> str:
        """Text by whose hash a row is held out, the prompt: pairs of one prompt are all held out or none."""
        return GROUPS[self.layout](row)

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """See `encode`.

        Raises:
            Unusable: two equal or empty answers, no decision between them, or a prompt that is none.
            ValueError: a field of the layout is missing or of another type.
        """
        if self.layout == "shp" and _number(row, "score_ratio") < self.min_score_ratio:
            raise Unusable(f"score_ratio below {self.min_score_ratio:g}")
        return encode(tokenizer, LAYOUTS[self.layout](row), self.system)


def encode(tokenizer: Tokenizer, pair: Pair, system: str = chatml.DEFAULT_SYSTEM) -> Encoded:
    """Tokens of both sides, the chosen one first, with `segment_lengths` int32 [2]; `LAYOUTS` gives the pair.

    Raises:
        Unusable: an answer is empty, both are equal, or the prompt does not end with a message of the user.
    """
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer.strip():
            raise Unusable("empty side", name)
    sides = [_side(tokenizer, pair.prompt, answer, system) for answer in (pair.chosen, pair.rejected)]
    if sides[0] == sides[1]:  # texts that differ in what the tokenizer normalizes
        raise Unusable("equal sides")
    tokens, weights = (np.array([*a, *b], np.int32) for a, b in zip(*sides, strict=True))
    return Encoded(tokens, weights, np.array([len(side[0]) for side in sides], np.int32))


def _side(tokenizer: Tokenizer, prompt: Conversation, answer: str, system: str) -> tuple[list[int], list[int]]:
    messages = (*prompt.messages, Message("assistant", answer))
    if len(messages) < 2 or messages[-2].role != "user":
        raise Unusable("a prompt that does not end with the user")
    said = react.say(check(dataclasses.replace(prompt, messages=messages)))
    *before, last = chatml.turns(tokenizer, [{"role": one.role, "content": one.content} for one in said], system)
    context = [token for turn in before for token in turn.ids] + list(last.header)
    answered = [*last.content, tokenizer.im_end_id]
    return context + answered, [0] * len(context) + [1] * len(answered)


def from_pairs(row: Mapping) -> Pair:
    """Reads the project's own layout, which is also that of trl's conversational and standard formats.

    `prompt` is text (one message of the user) or a list of messages; `messages` is another name for the list.
    `chosen` and `rejected` are text, a message, or messages of which the last is the answer and those before it are the
    prompt, which then need not stand by itself.
    """
    sides = [_messages(_field(row, name), name, "assistant") for name in ("chosen", "rejected")]
    if any(not side or side[-1].get("role") != "assistant" for side in sides):
        raise Unusable("a side that does not end with the assistant")
    own = row.get("prompt", row.get("messages"))
    prompt = [] if own is None else _messages(own, "prompt", "user")
    for side in sides:
        if len(side) > 1:
            if prompt and side[:-1] != prompt:
                raise Unusable("different prompts")
            prompt = side[:-1]
    if not prompt:
        raise ValueError("expected a prompt: a field 'prompt' or 'messages', or messages before the answer")
    chosen, rejected = (text_of(side[-1].get("content"), "answer") for side in sides)
    return Pair(from_openai({"messages": prompt, "tools": row.get("tools")}), chosen, rejected)


def from_hh_rlhf(row: Mapping) -> Pair:
    """Reads a row of hh-rlhf: both transcripts are split at their last "\\n\\nAssistant:".

    Blanks around each message are taken away.
    """
    prompts, answers = zip(*(split_transcript(_text(row, name)) for name in ("chosen", "rejected")), strict=True)
    if prompts[0] != prompts[1]:
        raise Unusable("different prompts")
    opening, *parts = _TURN.split(prompts[0])
    if opening.strip() or not parts or len(parts) % 2:
        raise Unusable("not a transcript that begins with Human")
    roles = {_HUMAN: "user", _ASSISTANT: "assistant"}
    messages = tuple(Message(roles[mark], text.strip()) for mark, text in zip(parts[::2], parts[1::2], strict=True))
    return Pair(Conversation(messages), answers[0].strip(), answers[1].strip())


def split_transcript(transcript: str) -> tuple[str, str]:
    """Prompt and answer of a transcript of hh-rlhf: what stands before and after its last "\\n\\nAssistant:".

    Raises:
        Unusable: it has none, or Human speaks last.
    """
    prompt, mark, answer = transcript.rpartition(_ASSISTANT)
    if not mark or _HUMAN in answer:
        raise Unusable("a transcript that does not end with Assistant")
    return prompt, answer


def from_shp(row: Mapping) -> Pair:
    """Reads a row of Stanford SHP; `labels` is 1 where A was preferred, 0 where B was."""
    answers = [_text(row, name).strip() for name in ("human_ref_A", "human_ref_B")]
    better = _choice(row, "labels", {1: 0, 0: 1})
    prompt = Conversation((Message("user", _text(row, "history").strip()),))
    return Pair(prompt, answers[better], answers[1 - better])


def from_summaries(row: Mapping) -> Pair:
    """Reads a comparison of summarize-from-feedback; the prompt is the one of its paper (arXiv 2009.01325)."""
    summaries = _field(row, "summaries")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(one, Mapping) for one in summaries):
        raise ValueError("expected two objects in 'summaries'")
    better = _choice(row, "choice", {0: 0, 1: 1})
    answers = [_text(one, "text").strip() for one in summaries]
    return Pair(Conversation((Message("user", _summary_prompt(row)),)), answers[better], answers[1 - better])


def _summary_prompt(row: Mapping) -> str:
    info = _field(row, "info")
    if isinstance(info, Mapping) and isinstance(info.get("article"), str):
        return f"Article:\n\n{info['article'].strip()}\n\nTL;DR:"
    if not isinstance(info, Mapping) or not isinstance(info.get("post"), str):
        raise ValueError("expected 'info' with a text 'post' or 'article'")
    heads = (("SUBREDDIT", "r/", "subreddit"), ("TITLE", "", "title"))
    shown = [f"{name}: {sign}{info[field].strip()}" for name, sign, field in heads if isinstance(info.get(field), str)]
    return "\n\n".join([*shown, f"POST: {info['post'].strip()}", "TL;DR:"])


LAYOUTS: dict[str, Callable[[Mapping], Pair]] = {
    "pairs": from_pairs,
    "hh_rlhf": from_hh_rlhf,
    "shp": from_shp,
    "summaries": from_summaries,
}


def _group_of_pairs(row: Mapping) -> str:
    """The prompt, however the row gives it: text, messages, or the messages of a side before its answer."""
    own, chosen = row.get("prompt", row.get("messages")), row.get("chosen")
    if own is None and isinstance(chosen, list):
        own = chosen[:-1]
    if isinstance(own, list) and all(isinstance(one, Mapping) for one in own):
        said = [(one.get("role"), one.get("content")) for one in own]
        own = said[0][1] if [role for role, _ in said] == ["user"] else said
    return repr(own if own is not None else chosen)


def _group_of_hh_rlhf(row: Mapping) -> str:
    return str(row.get("chosen")).rpartition(_ASSISTANT)[0]


# Each finds the prompt of a row, which may be no pair at all: the error comes when it is encoded.
GROUPS: dict[str, Callable[[Mapping], str]] = {
    "pairs": _group_of_pairs,
    "hh_rlhf": _group_of_hh_rlhf,
    "shp": lambda row: str(row.get("history")),
    "summaries": lambda row: repr(row.get("info")),
}


def _messages(value: object, name: str, role: str) -> list[Mapping]:
    """Messages of a field that holds text, a message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    found = [value] if isinstance(value, Mapping) else value
    if not isinstance(found, Sequence) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"expected text or messages in {name!r}, found {type(value).__name__}")
    return list(found)


def _field(row: Mapping, name: str):
    if not isinstance(row, Mapping) or name not in row:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"expected a field {name!r}, found {found or 'no field'}")
    return row[name]


def _text(row: Mapping, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name!r}, found {type(value).__name__}")
    return value


def _number(row: Mapping, name: str) -> float:
    value = _field(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number in {name!r}, found {value!r}")
    return float(value)


def _choice(row: Mapping, name: str, meaning: Mapping[int, int]) -> int:
    value = _field(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in meaning:
        raise Unusable(f"no decision in {name!r}", f"found {value!r}, expected 0 or 1")
    return meaning[value]
