"""Conversations to tokens and loss weights for supervised fine-tuning (report 3.1).

The loss is on what the assistant says; `loss_on` chooses how that is read:

    released    the assistant's content, and `<|im_start|>`, `<|im_end|>` and the line end after it in every turn, those
                of system and user included, as the released `finetune.py` masks
    report      the assistant's content and its `<|im_end|>`: what the model writes when it is served

What a tool wrote into a turn of the assistant (`qwen_jax.data.react`) never carries loss, nor does a picture. Content
is encoded by pieces, and text in it holds no control token (`qwen_jax.data.chatml`). As in `finetune.py`, a
conversation ends with the line end of its last turn, and no `<|endoftext|>` follows: packing `whole` keeps
conversations apart by segments.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping

import numpy as np

from qwen_jax.data import chatml, react
from qwen_jax.data.content import NUM_QUERIES, outside_pictures, pictures
from qwen_jax.data.conversations import Conversation, check, from_openai, from_question, from_sharegpt
from qwen_jax.data.tokenizer import Tokenizer, normalize

LAYOUTS: dict[str, Callable[[Mapping], Conversation]] = {
    "messages": from_openai,
    "sharegpt": from_sharegpt,
    "questions": from_question,
}
LOSS_ON = ("released", "report")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids with what packing needs to know (`qwen_jax.data.packers.Document`).

    Attributes:
        tokens: int32 [length].
        loss_weights: int32 [length], 0 or 1.
        segment_lengths: int32 [segments], or empty: one segment.
        turn_ends: int32, numbers of tokens after which the example may end, or empty: nowhere.
        images: the pictures, in the order of their `<img>`: names that a reader resolves, or bytes of image files.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    segment_lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    turn_ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    images: tuple[str | bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """How the rows of chat files become examples (`qwen_jax.data.records`).

    Attributes:
        layout: a key of `LAYOUTS`.
        loss_on: one of `LOSS_ON`.
        system: system message of a conversation without one.
        tool_style: one of `react.TRAINED_STYLES`, how tools are described.
    """

    layout: str = "messages"
    loss_on: str = "released"
    system: str = chatml.DEFAULT_SYSTEM
    tool_style: str = react.DEFAULT_STYLE

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}: it must be one of {', '.join(LAYOUTS)}")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is {self.loss_on!r}: it must be one of {', '.join(LOSS_ON)}")
        if self.tool_style not in react.TRAINED_STYLES:
            listed = ", ".join(react.TRAINED_STYLES)
            raise ValueError(f"tool_style is {self.tool_style!r}: it must be one of {listed}")

    def group(self, row: Mapping) -> str:
        """Text by whose hash a row is held out: the question, so that all its answers are; else the whole row."""
        if self.layout == "questions":
            with contextlib.suppress(ValueError):  # `encode` says what is wrong with the row
                return from_question(row).messages[-2].content
        return json.dumps(row, sort_keys=True, ensure_ascii=False)

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """See `encode`; raises `Unusable` and `ValueError` as the layout's reader and `check` do."""
        conversation = LAYOUTS[self.layout](row)
        return encode(tokenizer, conversation, loss_on=self.loss_on, system=self.system, tool_style=self.tool_style)


def encode(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    loss_on: str = "released",
    system: str = chatml.DEFAULT_SYSTEM,
    tool_style: str = react.DEFAULT_STYLE,
    num_queries: int = NUM_QUERIES,
) -> Encoded:
    """Tokens and loss weights of a conversation; it may end after each turn of the assistant.

    Args:
        tokenizer: its vocabulary.
        conversation: any; `check` is applied.
        loss_on: one of `LOSS_ON`; see the module.
        system: system message of a conversation without one.
        tool_style: see `react.say`.
        num_queries: features of a picture.

    Raises:
        Unusable: see `conversations.check` and `react.say`.
    """
    said = react.say(check(conversation), tool_style)
    messages = [{"role": one.role, "content": one.parts or one.content} for one in said]
    turns = chatml.turns(tokenizer, messages, system, num_queries)
    if len(turns) > len(said):
        said = [react.Said("system", system), *said]
    tokens: list[int] = []
    weights: list[int] = []
    ends: list[int] = []
    for turn, one in zip(turns, said, strict=True):
        tokens += turn.ids
        weights += _turn_weights(tokenizer, turn, one, loss_on)
        if turn.role == "assistant":
            ends.append(len(tokens))
    images = tuple(picture.image for one in said for picture in pictures(one.parts))
    columns = (np.array(numbers, np.int32) for numbers in (tokens, weights))
    return Encoded(*columns, turn_ends=np.array(ends, np.int32), images=images)


def _turn_weights(tokenizer: Tokenizer, turn: chatml.Turn, said: react.Said, loss_on: str) -> list[int]:
    mine, control = int(turn.role == "assistant"), int(loss_on == "released")
    header = [control] + [0] * (len(turn.header) - 1)
    content = [mine] * len(turn.content)
    if said.foreign:
        content = _without(tokenizer, turn.content, said)
    if pictures(said.parts):
        content = [mine * outside for outside in outside_pictures(tokenizer, turn.content).tolist()]
    footer = [mine | control] + [control] * (len(turn.footer) - 1)
    # The turn of an assistant who waits for a tool does not end with what it has said.
    return header + content + (footer if said.finished else [0] * len(turn.footer))


def _without(tokenizer: Tokenizer, ids: tuple[int, ...], said: react.Said) -> list[int]:
    """1 for each token of the content, 0 for those that begin in a foreign part."""
    spans = [tuple(len(normalize(said.content[:edge]).encode()) for edge in span) for span in said.foreign]
    weights, place = [], 0
    for token in ids:
        weights.append(int(not any(start <= place < stop for start, stop in spans)))
        place += len(tokenizer.decode_bytes([token]))
    return weights
