"""One request while the engine has it: its tokens so far, their text, and its end."""

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference.constraints import ConstraintFailed
from qwen_jax.inference.requests import (
    FAILED,
    LENGTH,
    STOP_ID,
    STOP_STRING,
    Handle,
    Ranking,
    Request,
    Result,
    StreamChunk,
)
from qwen_jax.inference.text import TextStream, token_bytes

log = logging.getLogger(__name__)


class Row:
    """One request from its submission to its end.

    Attributes:
      handle, tokenizer: of the request and the engine.
      key: the prompt, with what stands in the places of pictures; see `images.prompt_key`.
      streaming: whether its chunks should come often.
      inbox: where its chunks go.
      place: its row in the batch; None before it has one.
      finish_reason: None until it ends.
      cached_tokens: as in `Result`.
      version: of the prefix cache when the prompt was computed.
    """

    def __init__(self, handle: Handle, tokenizer, streaming: bool, inbox: deque, key: tuple[int, ...] | None = None):
        self.handle, self.tokenizer, self.streaming, self.inbox = handle, tokenizer, streaming, inbox
        self.key = tuple(handle.request.prompt) if key is None else key
        self.place: int | None = None
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.behavior_log_probs: list[float] = []
        self.top_log_probs: list[Ranking] = []
        self.text = TextStream(handle.request.stop_strings) if tokenizer is not None else None
        self.finish_reason: str | None = None
        self.cached_tokens = self.version = 0
        constraint = handle.request.constraint
        self._matcher = constraint.start() if constraint is not None else None
        self._failed = False

    @property
    def request(self) -> Request:
        """The request."""
        return self.handle.request

    @property
    def length(self) -> int:
        """Number of positions so far."""
        return self.request.prompt_length + len(self.tokens)

    @property
    def end(self) -> int:
        """The largest number of positions that it may have."""
        return self.request.prompt_length + self.request.max_new_tokens

    @property
    def constrained(self) -> bool:
        """Whether `allowed` says which tokens may come."""
        return self._matcher is not None

    def allowed(self) -> np.ndarray | None:
        """Which tokens may come next, see `constraints.Matcher`; None: any."""
        if self._matcher is None:
            return None
        try:
            return self._matcher.allowed()
        except ConstraintFailed as error:
            log.warning("the constraint of request %d failed: %s", self.handle.index, error)
            self._failed = True
            return None

    def take(
        self, tokens: Sequence[int], log_probs: Sequence[tuple[float, float]], ranked: Sequence[Ranking] = ()
    ) -> StreamChunk:
        """Adds new tokens, up to the one that ends it; none where its constraint failed, which ends it.

        Args:
          log_probs: the two of `next_tokens` for each.
          ranked: the most probable tokens in the place of each, at least as many as the request asks for.
        """
        before, text = len(self.tokens), ""
        if self._failed:
            tokens, log_probs, self.finish_reason = (), (), FAILED
            text = self.text.finish() if self.text is not None else ""
        for token, (log_prob, behavior) in zip(tokens, log_probs, strict=True):
            self.tokens.append(token)
            if self._matcher is not None:
                self._matcher.advance(token)
            self.log_probs.append(log_prob)
            self.behavior_log_probs.append(behavior)
            if token in self.request.stop_ids:
                self.finish_reason = STOP_ID
            elif self.text is not None:
                text += self.text.feed(token_bytes(self.tokenizer, token))
                if self.text.stopped:
                    self.finish_reason = STOP_STRING
            if self.finish_reason is None and len(self.tokens) == self.request.max_new_tokens:
                self.finish_reason = LENGTH
            if self.finish_reason:
                text += self.text.finish() if self.text is not None else ""
                break
        if self.request.top_log_probs:
            self.top_log_probs += [one[: self.request.top_log_probs] for one in ranked[: len(self.tokens) - before]]
        return StreamChunk(
            self.handle,
            tuple(self.tokens[before:]),
            tuple(self.log_probs[before:]),
            text if self.text is not None else None,
            self.finish_reason,
            self._result(self.finish_reason) if self.finish_reason else None,
            tuple(self.top_log_probs[before:]),
        )

    def _result(self, finish_reason: str) -> Result:
        return Result(
            self.handle.index,
            self.request,
            tuple(self.tokens),
            np.asarray(self.log_probs, np.float32),
            np.asarray(self.behavior_log_probs, np.float32),
            self.text.text if self.text is not None else None,
            finish_reason,
            self.cached_tokens,
            tuple(self.top_log_probs),
        )
