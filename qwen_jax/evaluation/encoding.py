"""Prompts and their continuations as token ids, by the rules of EleutherAI's lm-evaluation-harness 0.4.13."""

import dataclasses
import re
from collections.abc import Sequence

from qwen_jax.data import chatml
from qwen_jax.data.tokenizer import Tokenizer

# Text after a line end and before anything but white space is encoded as if it stood alone: no pattern of the tokenizer
# goes from one line into such a next one, and no character there composes with the line end.
_LINE_START = re.compile(r"\n(?=\S)")


@dataclasses.dataclass(frozen=True)
class CutPrompt:
    """A prompt that leaves room in the context.

    Attributes:
        ids: at least one.
        cut: number of tokens that were cut off.
    """

    ids: list[int]
    cut: int = 0


def encode_continuations(
    tokenizer: Tokenizer, prompt: str, continuations: Sequence[str], *, apart: bool = False
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and of each of the texts that may follow it.

    Prompt and continuation are encoded as one text, and the continuation is what follows as many tokens as the prompt
    has by itself. White space at the end of the prompt goes to the continuation before. An empty prompt, or one of
    white space, becomes `<|endoftext|>`. Where the border of both lies within a token, so that none is left for the
    continuation, they are encoded apart. Names of control tokens stay text.

    Args:
        apart: whether to encode both apart in any case, and leave the white space where it is.

    Raises:
        ValueError: a continuation is empty.
    """
    if "" in continuations:
        raise ValueError(f"continuation {list(continuations).index('')} of {prompt[-60:]!r} is empty")
    if apart:
        return _or_end(tokenizer, tokenizer.encode(prompt)), [tokenizer.encode(text) for text in continuations]
    kept = prompt.rstrip()
    moved = prompt[len(kept) :]
    if not kept:
        return [tokenizer.endoftext_id], [tokenizer.encode(moved + text) for text in continuations]
    # Only the last line meets the continuations.
    start = max((found.end() for found in _LINE_START.finditer(kept)), default=0)
    line = kept[start:]
    before, of_line = tokenizer.encode(kept[:start]), tokenizer.encode(line)
    following = []
    for text in continuations:
        ids = tokenizer.encode(line + moved + text)[len(of_line) :]
        following.append(ids or tokenizer.encode(moved + text))
    return before + of_line, following


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt that the model continues; an empty one is `<|endoftext|>`."""
    return _or_end(tokenizer, tokenizer.encode(prompt))


def _or_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids or [tokenizer.endoftext_id]


def cut_left(ids: list[int], room: int) -> CutPrompt:
    """The last `room` tokens of a prompt; of one that fits, the same list.

    Raises:
        ValueError: there is room for none.
    """
    if room < 1:
        raise ValueError("the answer alone fills the context: no token of the prompt has room before it")
    cut = max(len(ids) - room, 0)
    return CutPrompt(ids[cut:] if cut else ids, cut)


def cut_pair(
    prompt: list[int], following: list[int], room: int, *, whole_text: bool = False
) -> tuple[CutPrompt, list[int]]:
    """A prompt that leaves room for what follows it, and what follows.

    Args:
        room: largest number of tokens of both together: one more than the context, as the model does not read the last.
        whole_text: nothing but the token that begins a text stands before it. If the text is too long, it is cut from
            the left itself, and the last token that is cut off takes the place of the prompt.

    Raises:
        ValueError: what follows a prompt fills the context.
    """
    if whole_text and len(following) >= room:
        cut = len(following) - room
        return CutPrompt([following[cut]], cut + 1), following[cut + 1 :]
    return cut_left(prompt, room - len(following)), following


def chat_prompt(tokenizer: Tokenizer, question: str, room: int) -> CutPrompt:
    """A question to a chat model in ChatML, with the default system message and the header of the answer.

    If it has more than `room` tokens, the question is cut from the left, and its turns stay whole.

    Raises:
        ValueError: there is no room for the turns.
    """
    messages = [{"role": "user", "content": question}]
    system, user = chatml.turns(tokenizer, messages)
    whole = chatml.encode_prompt(tokenizer, messages)
    question_room = room - (len(whole) - len(user.content))
    if question_room < min(len(user.content), 1):
        raise ValueError(f"{room} tokens of context are too few for the turns of ChatML")
    cut = max(len(user.content) - question_room, 0)
    start = len(system.ids) + len(user.header)
    return CutPrompt(whole[:start] + whole[start + cut :], cut)
