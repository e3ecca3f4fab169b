"""One choice of an answer: the engine's chunks of a continuation to what a client sees of it."""

import dataclasses
from collections.abc import Sequence

from qwen_jax.inference import StreamChunk
from qwen_jax.inference.requests import FAILED, LENGTH, STOP_ID, Ranking, Score
from qwen_jax.inference.text import token_bytes
from qwen_jax.serving.deltas import Reply, ToolCall
from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.protocol import Job


@dataclasses.dataclass(frozen=True)
class TokenProb:
    """A token of a reply with its log-probability.

    Attributes:
        data: bytes.
        log_prob: of the model, before all rules of drawing; None for the first token of a prompt.
        top: (bytes, log-probability) of the most probable tokens in its place, descending.
    """

    data: bytes
    log_prob: float | None
    top: Sequence[tuple[bytes, float]] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """What a chunk adds to a choice.

    Attributes:
        content: text.
        tokens: the new tokens, if log-probabilities are asked for; in a chat, the one that ended the reply is not among
            them if it is no text.
        finish_reason: "stop", "length" or "tool_calls" in the last part, else None.
        call: the call of the reply, in the last part.
    """

    content: str
    tokens: Sequence[TokenProb]
    finish_reason: str | None = None
    call: ToolCall | None = None


class Choice:
    """A choice under way.

    Args:
        job: the job that it belongs to.
        tokenizer: of the engine.
    """

    def __init__(self, job: Job, tokenizer):
        self._job, self._tokenizer = job, tokenizer
        self._reply = Reply(job.opening, job.tools)
        self._echo = job.echo

    def take(self, chunk: StreamChunk, score: Score | None = None) -> Part:
        """The part that a chunk makes; of an echo, the first one begins with the prompt.

        Args:
            score: of the prompt's tokens after the first, if there is an echo with log-probabilities.

        Raises:
            ApiError: the constraint of the reply could not be followed to its end.
        """
        if chunk.finish_reason == FAILED:
            raise bad_request(None, "the schema is too costly to follow: give a simpler one, without patterns")
        content, tokens = self._prompt(chunk.request.prompt, score) if self._echo else ("", [])
        self._echo = False
        content += self._reply.feed(chunk.text or "")
        if self._job.logprobs:
            # The older protocol has the token that ended a completion among its tokens.
            hidden = chunk.request.stop_ids if self._job.chat else ()
            added = self._probs(chunk.tokens, chunk.log_probs, chunk.top_log_probs)
            tokens += [one for token, one in zip(chunk.tokens, added, strict=True) if token not in hidden]
        if chunk.finish_reason is None:
            return Part(content, tokens)
        truncated = chunk.finish_reason == LENGTH
        rest, call = self._reply.finish(truncated, self._job.held and chunk.finish_reason == STOP_ID)
        reason = "tool_calls" if call else "length" if truncated else "stop"
        return Part(content + rest, tokens, reason, call)

    def _prompt(self, prompt: Sequence[int], score: Score | None) -> tuple[str, list[TokenProb]]:
        """Text of a prompt, and its tokens, if log-probabilities are asked for."""
        data = [self._bytes(token) for token in prompt]
        tokens = []
        if score is not None:
            tokens = [TokenProb(data[0], None)]
            tokens += self._probs(prompt[1:], score.log_probs.tolist(), score.top_log_probs)
        return b"".join(data).decode("utf-8", "replace"), tokens

    def _probs(self, tokens: Sequence[int], log_probs: Sequence[float], ranked: Sequence[Ranking]) -> list[TokenProb]:
        return [
            TokenProb(self._bytes(token), log_prob, [(self._bytes(one), value) for one, value in top])
            for token, log_prob, top in zip(tokens, log_probs, ranked or [()] * len(tokens), strict=True)
        ]

    def _bytes(self, token: int) -> bytes:
        return token_bytes(self._tokenizer, token)


def whole(parts: Sequence[Part]) -> Part:
    """All parts of a choice as one."""
    content = "".join(part.content for part in parts)
    tokens = [token for part in parts for token in part.tokens]
    return Part(content, tokens, parts[-1].finish_reason, parts[-1].call)
