"""Responses of the current policy to prompts: the engine of inference, with the weights of training."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.inference import Engine, Request, SamplingConfig
from qwen_jax.inference.requests import STOP_ID
from qwen_jax.models.transformer import Qwen
from qwen_jax.training.batches import Examples


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      index: in the order of the data, which never ends.
      tokens: its ids.
      answer: ids of the reference answer; empty without one.
    """

    index: int
    tokens: tuple[int, ...]
    answer: tuple[int, ...] = ()


def read_prompts(examples: Examples, start: int, count: int) -> list[Prompt]:
    """Prompts [start, start + count) of the order: segment 1 of each row; segment 2 is a reference answer, if there.

    Raises:
      ValueError: the data are not rows of one prompt each.
    """
    names = {column.name for column in examples.columns}
    if "segment_ids" not in names:
        raise ValueError("prompts must be packed one in a row: set PACKING = 'padded' for the task of prompts")
    rows = examples.read(start, start + count)
    prompts = []
    for index, (tokens, segments) in enumerate(zip(rows["tokens"], rows["segment_ids"], strict=True), start):
        prompt, answer = (tuple(tokens[segments == number].tolist()) for number in (1, 2))
        if not prompt:
            raise ValueError(f"prompt {index} of the order has no token: cache the task again")
        prompts.append(Prompt(index, prompt, answer))
    return prompts


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed for a response, 0 to 2^32 - 1, by the run's seed, the prompt's index and the number of the response."""
    digest = hashlib.blake2b(f"{seed}:{prompt}:{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclasses.dataclass(frozen=True)
class Responses:
    """Prompts with their responses, the responses to one prompt side by side.

    Attributes:
      prompts: of each row.
      responses: ids of each row's response, with its end token.
      tokens: int32 [rows, length]: prompt, response, filling.
      mask: float32 [rows, length], 1 at the tokens of the response.
      behavior_log_probs: float32 [rows, length], at the tokens of the response.
      ended: float32 [rows], 1 where the response has its end token.
    """

    prompts: list[Prompt]
    responses: list[tuple[int, ...]]
    tokens: np.ndarray
    mask: np.ndarray
    behavior_log_probs: np.ndarray
    ended: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """Position of the last token of each row, int32 [rows]."""
        lengths = [len(p.tokens) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]
        return np.asarray(lengths, np.int32) - 1


class Responder:
    """Generates responses with an engine that takes over the weights of training."""

    def __init__(
        self, policy: Qwen, mesh: Mesh, sampling: SamplingConfig, stop_ids: Sequence[int], length: int, slots: int
    ):
        """Makes the engine with the first weights.

        Args:
          stop_ids: end tokens; the first one ends a message.
          length: tokens of a prompt with its response, at most.
          slots: responses that are generated together.
        """
        self._policy, self._mesh, self._sampling, self._slots = policy, mesh, sampling, slots
        self._stop_ids, self._length = tuple(stop_ids), length
        self.engine: Engine | None = None
        self._compilations = 0

    def take_weights(self, params: dict) -> None:
        """Goes on with these weights of a training state, which a later train step may donate; returns when it has."""
        if self.engine is None:
            self.engine = Engine(self._policy, params, None, self._mesh, self._slots, self._length)
        else:
            self.engine.set_params(params)
        jax.block_until_ready(self.engine.params)

    def release_weights(self) -> None:
        """Frees what the engine holds beside the training state."""
        assert self.engine is not None  # `take_weights` has made it
        self.engine.params = {}

    def has_compiled(self) -> bool:
        """Whether the engine has compiled programs since the last call."""
        assert self.engine is not None  # `take_weights` has made it
        before, self._compilations = self._compilations, self.engine.compilations
        return self._compilations > before

    def respond(
        self, prompts: Sequence[Prompt], count: int, new_tokens: int, seed: int, tell: Callable[[int], None]
    ) -> Responses:
        """`count` responses to each prompt.

        Args:
          new_tokens: of a response, at most.
          tell: called with the number of finished responses whenever one has finished.
        """
        assert self.engine is not None  # `take_weights` has made it
        repeated = [prompt for prompt in prompts for _ in range(count)]
        requests = [
            Request(
                prompt.tokens,
                new_tokens,
                self._sampling,
                self._stop_ids,
                seed=response_seed(seed, prompt.index, row % count),
            )
            for row, prompt in enumerate(repeated)
        ]
        tokens = np.full((len(requests), self._length), self._stop_ids[-1], np.int32)
        mask, behavior = np.zeros((2, *tokens.shape), np.float32)
        ended = np.zeros(len(requests), np.float32)
        responses: list[tuple[int, ...]] = [()] * len(requests)
        for done, result in enumerate(self.engine.generate(requests), start=1):
            row, prompt = result.index, repeated[result.index].tokens
            place = slice(len(prompt), len(prompt) + len(result.tokens))
            tokens[row, : place.start], tokens[row, place] = prompt, result.tokens
            mask[row, place], behavior[row, place] = 1.0, result.behavior_log_probs
            ended[row], responses[row] = result.finish_reason == STOP_ID, result.tokens
            tell(done)
        return Responses(repeated, responses, tokens, mask, behavior, ended)
