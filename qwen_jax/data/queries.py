"""Prompts that a model is to answer, for PPO and GRPO (report 3.2.2): ChatML up to where the assistant begins to speak.

A row has `prompt` (text) or `messages`, and optionally `answer`, the reference answer of a programmatic reward. The
prompt is segment 1 with loss weight 1; the text of the answer follows as segment 2 with loss weight 0.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from qwen_jax.data import chatml, react
from qwen_jax.data.chat import Encoded
from qwen_jax.data.conversations import Conversation, Message, Unusable, check, from_openai
from qwen_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class QueryRows:
    """How the rows of prompt files become examples (`qwen_jax.data.records`).

    Attributes:
        system: system message of a prompt without one.
    """

    system: str = chatml.DEFAULT_SYSTEM
    layout: str = "queries"

    def group(self, row: Mapping) -> str:
        """Text by whose hash a row is held out: the prompt."""
        return json.dumps([row.get("prompt"), row.get("messages")], sort_keys=True, ensure_ascii=False)

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """Tokens of the prompt and of the answer, with `segment_lengths` int32 [1] or [2].

        Raises:
            Unusable: an empty prompt, one that does not end with the user, or an empty answer.
            ValueError: the row has neither `prompt` nor `messages`, or a field of another type.
        """
        prompt = _prompt(row)
        if not prompt.messages or prompt.messages[-1].role != "user":
            raise Unusable("a prompt that does not end with the user")
        # A word of the assistant, only for the check and the tools' text.
        said = react.say(check(dataclasses.replace(prompt, messages=(*prompt.messages, Message("assistant", "x")))))
        messages = [{"role": one.role, "content": one.content} for one in said[:-1]]
        segments = [chatml.encode_prompt(tokenizer, messages, self.system)]
        answer = row.get("answer")
        if answer is not None:
            if not isinstance(answer, str | int | float) or isinstance(answer, bool):
                raise ValueError(f"expected text or a number in 'answer', found {type(answer).__name__}")
            if not str(answer):
                raise Unusable("empty answer")
            segments.append(tokenizer.encode(str(answer)))
        weights = [1 - index for index, segment in enumerate(segments) for _ in segment]
        tokens = [token for segment in segments for token in segment]
        lengths = [len(segment) for segment in segments]
        columns = [np.array(numbers, np.int32) for numbers in (tokens, weights, lengths)]
        return Encoded(columns[0], columns[1], columns[2])


def _prompt(row: Mapping) -> Conversation:
    if not isinstance(row, Mapping) or ("prompt" not in row and "messages" not in row):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"expected a field 'prompt' or 'messages', found {found or 'no field'}")
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return from_openai({"messages": prompt, "tools": row.get("tools")})
