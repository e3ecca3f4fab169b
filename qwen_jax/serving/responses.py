"""Answers as OpenAI's API writes them, whole or in chunks."""

import codecs
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.serving.choices import Part, TokenProb
from qwen_jax.serving.deltas import ToolCall
from qwen_jax.serving.protocol import Job

DONE = b"data: [DONE]\n\n"


def dump(content: object) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(content: object) -> bytes:
    """One event of a stream."""
    return b"data: " + dump(content) + b"\n\n"


class Answer:
    """Writes the answer to one job.

    Args:
        job: the job.
        model: name of the model.
    """

    def __init__(self, job: Job, model: str):
        self._job = job
        self._chat = job.chat
        self._head = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, _Offsets] = {}

    def whole(self, parts: Sequence[Part], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer as one object, of all choices in order."""
        choices = []
        for index, part in enumerate(parts):
            choice: dict[str, Any] = {"index": index, "finish_reason": part.finish_reason, "logprobs": None}
            if self._job.logprobs:
                choice["logprobs"] = self._log_probs(index, part)
            if not self._chat:
                choices.append(choice | {"text": part.content})
                continue
            message: dict[str, Any] = {"role": "assistant", "content": part.content, "refusal": None}
            if part.call is not None:
                message |= {"content": part.content or None, "tool_calls": [_call(part.call)]}
            choices.append(choice | {"message": message})
        kind = "chat.completion" if self._chat else "text_completion"
        return {"object": kind, **self._head, "choices": choices, "usage": usage}

    def begin(self) -> Iterator[bytes]:
        """The first events of a stream: who speaks, once for each choice, in their order."""
        if self._chat:
            for index in range(len(self._job.requests)):
                delta = {"role": "assistant", "content": ""}
                yield self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def events(self, index: int, part: Part) -> Iterator[bytes]:
        """The events of a part of choice `index`; only what is said in it is in its delta."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        if self._job.logprobs and part.tokens:
            choice["logprobs"] = self._log_probs(index, part)
        if part.content or choice["logprobs"] is not None:
            text = {"delta": {"content": part.content}} if self._chat else {"text": part.content}
            yield self._chunk(choice | text)
        if part.call is not None:
            delta = {"tool_calls": [{"index": 0, **_call(part.call)}]}
            yield self._chunk({**choice, "logprobs": None, "delta": delta})
        if part.finish_reason is not None:
            text = {"delta": {}} if self._chat else {"text": ""}
            yield self._chunk({**choice, "logprobs": None, "finish_reason": part.finish_reason, **text})

    def end(self, usage: dict[str, Any]) -> Iterator[bytes]:
        """The last events: the usage where it is asked for, and the mark of the end."""
        if self._job.include_usage:
            yield self._chunk(None, usage=usage)
        yield DONE

    def _chunk(self, choice: dict[str, Any] | None, **more: object) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choices = [] if choice is None else [choice]
        usage = {"usage": None} if self._job.include_usage else {}
        return event({"object": kind, **self._head, "choices": choices, **usage, **more})

    def _log_probs(self, index: int, part: Part) -> dict[str, Any]:
        if self._chat:
            return {
                "content": [
                    {**_spelled(one.data, one.log_prob), "top_logprobs": [_spelled(*other) for other in one.top]}
                    for one in part.tokens
                ],
                "refusal": None,
            }
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [_name(one.data) for one in part.tokens],
            "token_logprobs": [one.log_prob for one in part.tokens],
            "top_logprobs": [_by_name(one) for one in part.tokens] if self._job.top_log_probs else None,
            "text_offset": [offsets.before(one.data) for one in part.tokens],
        }


class _Offsets:
    """Where tokens begin in the text of a completion; in the middle of a character, that is where it begins."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def before(self, data: bytes) -> int:
        """Number of characters before `data`, the next token."""
        found = self._characters
        self._characters += len(self._decoder.decode(data))
        return found


def _spelled(data: bytes, log_prob: float | None) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": log_prob, "bytes": list(data)}


def _name(data: bytes) -> str:
    """Text of a token in a completion; of one that is no text by itself, its bytes, as keys have to differ."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _by_name(token: TokenProb) -> dict[str, float] | None:
    """Log-probabilities of the most probable tokens and of the token itself, by their text; None: it has none."""
    if token.log_prob is None:
        return None
    found: dict[str, float] = {}
    for data, log_prob in (*token.top, (token.data, token.log_prob)):
        found.setdefault(_name(data), log_prob)
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def usage(job: Job, completion_tokens: int, cached: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Numbers of tokens; a prompt is counted once, whatever `n`.

    Args:
        cached: tokens of the prompt that were not computed for a request, by its place in the job.
    """
    # The requests of one prompt share its list of ids.
    prompt_tokens = sum({id(request.prompt): len(request.prompt) for request in job.requests}.values())
    # Of the requests of one prompt, those after the first compute nothing.
    least: dict[int, int] = {}
    for place, tokens in (cached or {}).items():
        prompt = id(job.requests[place].prompt)
        least[prompt] = min(tokens, least.get(prompt, tokens))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(least.values())},
    }
