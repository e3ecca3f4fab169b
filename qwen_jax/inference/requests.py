"""What is asked of the engine and what it answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference.sampling import SamplingConfig

STOP_ID, STOP_STRING, LENGTH = "stop_id", "stop_string", "length"


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one: integers in a sequence or an array.
      max_new_tokens: at most so many tokens, the one that ends it included.
      sampling: how each is drawn; greedy by default.
      stop_ids: a token among them ends the continuation. It is counted and reported, but is no part of the text.
      stop_strings: the continuation ends as soon as its text (without the prompt) has one of them. The text ends before
        it; the tokens end with the one that completed it. Needs a tokenizer.
      seed: 0 to 2^32 - 1. The draws are a function of it and of the position: the same prompt with the same seed gives
        the same tokens, whatever is generated beside it, so samples of one prompt need different seeds.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What a streamed continuation has grown by.

    Attributes:
      tokens, log_probs: as in `Result`, the new ones.
      text: what can be said of the text by now; it may lag behind the tokens. None without a tokenizer.
      finish_reason: in the last piece, else None.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str | None
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished continuation.

    Attributes:
      index: place of its request among those of the call.
      request: the request.
      tokens: the new ids, with the one that ended it.
      log_probs: float32 [len(tokens)], logarithm of the probability that the model gives each token after those before
        it: of the unmodified logits, before penalty, temperature, top-k and top-p.
      text: of the tokens, without what ended it; None without a tokenizer.
      finish_reason: "stop_id", "stop_string", or "length": max_new_tokens were reached.
    """

    index: int
    request: Request
    tokens: tuple[int, ...]
    log_probs: np.ndarray
    text: str | None
    finish_reason: str


def check_request(request: Request, vocab_size: int, context_length: int, length_rule: str, tokenizer) -> Request:
    """The request with plain integers in its fields, if it can be answered.

    Args:
      context_length: how many tokens prompt and continuation may have together; `length_rule` says where that is from.
      tokenizer: the engine's, or None.

    Raises:
      ValueError: an empty or too long prompt, ids outside the vocabulary or that are no integers, nothing to generate,
        a seed out of range, an empty stop string, or stop strings without a tokenizer.
    """
    if not isinstance(request, Request):
        raise ValueError(f"expected a Request, found {type(request).__name__}: Request(prompt=[…], max_new_tokens=…)")
    prompt = _ids(request.prompt, "the prompt", vocab_size)
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    stop_ids = _ids(request.stop_ids, "stop_ids", vocab_size)
    for name, lowest, limit in (("max_new_tokens", 1, None), ("seed", 0, 2**32)):
        value = getattr(request, name)
        if not isinstance(value, int | np.integer) or value < lowest or (limit and value >= limit):
            raise ValueError(
                f"{name} must be an integer of at least {lowest}{f', below {limit}' * bool(limit)}, found {value!r}"
            )
    if isinstance(request.stop_strings, str) or not all(isinstance(s, str) and s for s in request.stop_strings):
        raise ValueError(f"stop_strings must be a sequence of strings that are not empty: {request.stop_strings!r}")
    if request.stop_strings and tokenizer is None:
        raise ValueError("stop_strings are found in the text, so the engine needs a tokenizer: Engine(…, tokenizer=…)")
    if len(prompt) + request.max_new_tokens > context_length:
        raise ValueError(
            f"prompt of {len(prompt)} tokens + {request.max_new_tokens} new ones: both together may have at most "
            f"{context_length} tokens, {length_rule}; shorten the prompt or lower max_new_tokens"
        )
    return dataclasses.replace(
        request,
        prompt=prompt,
        stop_ids=stop_ids,
        stop_strings=tuple(request.stop_strings),
        max_new_tokens=int(request.max_new_tokens),
        seed=int(request.seed),
    )


def _ids(ids: Sequence[int], name: str, vocab_size: int) -> tuple[int, ...]:
    if isinstance(ids, str | bytes):
        raise ValueError(f"{name} must be token ids, found text: encode it with the model's tokenizer first")
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{name} must be token ids of one row, found an array of shape {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, found {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise ValueError(f"{name} has the id {wrong}, outside [0, {vocab_size}) of the model: another tokenizer's?")
    return tuple(array.tolist())
