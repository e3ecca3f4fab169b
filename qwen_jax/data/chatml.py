"""ChatML, the format of the released chat models (report 3.1): messages to token ids.

A turn is `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`. Role, line ends and content are encoded each by itself, as the
released `make_context` and `finetune.py` do, and control tokens are put between them as ids: no text can become one.
Content may also be parts, texts and pictures (`qwen_jax.data.content`).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from qwen_jax.data import content as content_of
from qwen_jax.data.content import NUM_QUERIES, Content, Part
from qwen_jax.data.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Turn:
    """The token ids of one message, in the three parts that training tells apart.

    Attributes:
      role: one of `ROLES`.
      header: `<|im_start|>`, the role's name, a line end.
      content: the text of the message; holds no control token but those of pictures and regions.
      footer: `<|im_end|>`, a line end.
    """

    role: str
    header: tuple[int, ...]
    content: tuple[int, ...]
    footer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the whole message."""
        return self.header + self.content + self.footer


def turns(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Content]],
    system: str = DEFAULT_SYSTEM,
    num_queries: int = NUM_QUERIES,
) -> list[Turn]:
    """The turns of a conversation.

    Args:
      messages: each with `role` and `content`, oldest first. Content is untrusted text: the name of a control
        token in it is encoded as ordinary characters. Or it is parts, of which the texts are.
      system: system message of a conversation without one.
      num_queries: features of a picture.

    Raises:
      ValueError: a message has another role, or its content is neither text nor parts; the error names its index.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ValueError(f"message {index}: role {role!r} is none of {', '.join(ROLES)}")
        given = message.get("content")
        if not isinstance(given, str) and not (isinstance(given, Sequence) and all(isinstance(p, Part) for p in given)):
            raise ValueError(f"message {index}: content must be text, found {type(given).__name__}")
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return [_turn(tokenizer, str(message["role"]), message["content"], num_queries) for message in messages]


def _turn(tokenizer: Tokenizer, role: str, content: Content, num_queries: int) -> Turn:
    line_end = tuple(tokenizer.encode("\n"))
    ids = tuple(content_of.encode(tokenizer, content, num_queries))
    return Turn(role, _header(tokenizer, role), ids, (tokenizer.im_end_id, *line_end))


def _header(tokenizer: Tokenizer, role: str) -> tuple[int, ...]:
    return (tokenizer.im_start_id, *tokenizer.encode(role), *tokenizer.encode("\n"))


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Content]],
    system: str = DEFAULT_SYSTEM,
    num_queries: int = NUM_QUERIES,
) -> list[int]:
    """Token ids of a conversation and of the header after which the assistant speaks; arguments as in `turns`."""
    whole = (turn.ids for turn in turns(tokenizer, messages, system, num_queries))
    return [*itertools.chain.from_iterable(whole), *_header(tokenizer, "assistant")]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Content]], system: str = DEFAULT_SYSTEM
) -> list[int]:
    """Token ids of a conversation up to the `<|im_end|>` of its last message, where reward models read their reward.

    The line end after it is left out; `apply_chat_template` of other software renders it. Arguments as in `turns`.

    Raises:
      ValueError: as `turns`, or the last message is not the assistant's.
    """
    if not messages:
        raise ValueError("the conversation has no message")
    parts = turns(tokenizer, messages, system)
    if parts[-1].role != "assistant":
        raise ValueError(f"the last message is of role {parts[-1].role!r}: a reward is that of the assistant's answer")
    ids = list(itertools.chain.from_iterable(turn.ids for turn in parts))
    return ids[: len(ids) - len(parts[-1].footer) + 1]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids that end a message of the assistant: `<|im_end|>` and `<|endoftext|>`."""
    return tokenizer.im_end_id, tokenizer.endoftext_id
