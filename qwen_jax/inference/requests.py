"""Request and result types of the engine, and the check of a request."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qwen_jax.inference.constraints import Constraint
from qwen_jax.inference.images import checked_images
from qwen_jax.inference.sampling import LARGEST_BIAS, MOST_LIKELY, SamplingConfig
from qwen_jax.models.config import ModelConfig

STOP_ID, STOP_STRING, LENGTH, FAILED = "stop_id", "stop_string", "length", "failed"
MOST_BIASES = 1024
# The most probable tokens in the place of one token: (id, log-probability) of each, descending.
Ranking = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      prompt: token ids, integers in a sequence or an array. At least one, unless `embeddings` are the whole prompt.
      max_new_tokens: the largest number of tokens to generate, with the one that ends the continuation.
      sampling: how each token is drawn; greedy by default.
      stop_ids: a token among them ends the continuation. It is counted and reported, but is no part of the text.
      stop_strings: the continuation ends as soon as its text (without the prompt) has one of them. The text ends before
        it; the tokens end with the one that completed it. Needs a tokenizer.
      seed: seed for sampling, 0 to 2^32 - 1. The random numbers are a function of it and of the position, not of the
        requests beside it: several samples of one prompt need different seeds.
      embeddings: floats [n, hidden] that the model reads in place of token embeddings, such as features of an image.
        Without `embedding_positions` they are the whole prompt, and `prompt` is empty.
      embedding_positions: the n positions of `prompt` whose tokens the embeddings replace. The repetition penalty
        counts the ids that stand there like others.
      images: the pictures of the prompt in the order of its text, for a model with an image encoder: uint8
        [image_size, image_size, 3] in RGB, or floats of that shape as `qwen_jax.data.images.pixels` gives them. Each
        has in the prompt `<img>`, `num_queries` ids (whose places its features take), and `</img>`.
      logit_bias: numbers, by token id, that are added to the logits before all rules of `sampling`: from -100, which
        bans a token in effect, to 100. At most `MOST_BIASES`.
      top_log_probs: how many of the most probable tokens are told with each token, 0 to 20.
      constraint: what the continuation may be; its end tokens are among `stop_ids`, and come where it is whole. A
        `grammars.Grammar`, for one. Tokens that it does not allow are left out after biases and penalties and before
        all else. All rows of a batch go token by token while one has a constraint.
    """

    prompt: Sequence[int] = ()
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int = 0
    embeddings: np.ndarray | None = None
    embedding_positions: Sequence[int] | None = None
    images: Sequence[np.ndarray] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    top_log_probs: int = 0
    constraint: Constraint | None = None

    @property
    def prompt_length(self) -> int:
        """Number of positions that the prompt takes."""
        return len(self.prompt) or (0 if self.embeddings is None else len(self.embeddings))


@dataclasses.dataclass(frozen=True, eq=False)
class Handle:
    """A submitted request.

    Attributes:
      index: number of the submission, or the place in the `requests` of `generate`.
      request: with plain integers in its fields.
    """

    index: int
    request: Request


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """New tokens of one continuation.

    Attributes:
      handle: of the request.
      tokens, log_probs, top_log_probs: as in `Result`, the new ones.
      text: the text that later tokens cannot change; it may lag behind the tokens. None without a tokenizer.
      finish_reason: in the last chunk, else None.
      result: the whole continuation, in the last chunk, else None.
    """

    handle: Handle
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str | None
    finish_reason: str | None = None
    result: "Result | None" = None
    top_log_probs: tuple[Ranking, ...] = ()

    @property
    def index(self) -> int:
        """Index of the handle."""
        return self.handle.index

    @property
    def request(self) -> Request:
        """Request of the handle."""
        return self.handle.request


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished continuation.

    Attributes:
      index: index of the handle.
      request: the request.
      tokens: the generated ids, with the one that ended the continuation.
      log_probs: float32 [len(tokens)], logarithm of the probability that the model gives each token after those before
        it: of the unmodified logits, before biases and all rules of `sampling`.
      behavior_log_probs: float32 [len(tokens)], the same of the distribution that each token was drawn from: after
        biases and all rules. Zeros at temperature 0.
      text: text of the tokens, without the stop id or stop string that ended it; None without a tokenizer.
      finish_reason: "stop_id", "stop_string", "length": max_new_tokens were reached, or "failed": the constraint could
        not say what may come next, as it is too costly to follow.
      cached_tokens: number of tokens of the prompt that were not computed for this request: the prefix cache had them,
        or they were computed for another request with the same prompt.
      top_log_probs: for each token, the `Request.top_log_probs` most probable ones in its place, with their
        log-probabilities as in `log_probs`; empty where the request asks for none. The token itself may not be among
        them.
    """

    index: int
    request: Request
    tokens: tuple[int, ...]
    log_probs: np.ndarray
    behavior_log_probs: np.ndarray
    text: str | None
    finish_reason: str
    cached_tokens: int = 0
    top_log_probs: tuple[Ranking, ...] = ()


@dataclasses.dataclass(frozen=True)
class Score:
    """Score of a given continuation under the model.

    Attributes:
      log_probs: float32 [tokens], logarithm of the probability of each token after all before it, in nats.
      most_likely: bool [tokens], whether no other token had a larger logit there: a greedy continuation is all True.
      top_log_probs: for each token, the most probable ones in its place; empty where none were asked for. A token among
        them has the log-probability that it has in `log_probs`, to the last bit.
    """

    log_probs: np.ndarray
    most_likely: np.ndarray
    top_log_probs: tuple[Ranking, ...] = ()


def check_request(request: Request, config: ModelConfig, context_length: int, length_rule: str, tokenizer) -> Request:
    """The request with plain integers in its fields.

    Args:
      config: of the model.
      context_length: the largest number of tokens of prompt and continuation together; `length_rule` names the setting
        behind it.
      tokenizer: the engine's, or None.

    Raises:
      ValueError: an empty or too long prompt, ids outside the vocabulary or that are no integers, nothing to generate,
        a seed or a bias out of range, an empty stop string, stop strings without a tokenizer, a constraint whose end
        tokens are no stop ids, embeddings of another shape, or pictures that are not those of the prompt.
    """
    if not isinstance(request, Request):
        raise ValueError(f"expected a Request, found {type(request).__name__}: Request(prompt=[…], max_new_tokens=…)")
    prompt = check_ids(request.prompt, "the prompt", config.vocab_size)
    request = dataclasses.replace(request, prompt=prompt, **_checked_embeddings(request, prompt, config.hidden_size))
    if request.embeddings is not None and request.images:
        raise ValueError("give pictures, or the embeddings that take the place of tokens, not both")
    if request.embeddings is None:
        request = dataclasses.replace(request, images=checked_images(prompt, request.images, config))
    stop_ids = check_ids(request.stop_ids, "stop_ids", config.vocab_size)
    if request.constraint is not None and not set(request.constraint.end_ids) <= set(stop_ids):
        raise ValueError(
            f"the constraint ends with one of {list(request.constraint.end_ids)}: have all of them in stop_ids, found "
            f"{list(stop_ids)}"
        )
    limits = ("max_new_tokens", 1, None), ("seed", 0, 2**32), ("top_log_probs", 0, MOST_LIKELY + 1)
    for name, lowest, limit in limits:
        value = getattr(request, name)
        if not isinstance(value, int | np.integer) or value < lowest or (limit and value >= limit):
            raise ValueError(
                f"{name} must be an integer of at least {lowest}{f', below {limit}' * bool(limit)}, found {value!r}"
            )
    if isinstance(request.stop_strings, str) or not all(isinstance(s, str) and s for s in request.stop_strings):
        raise ValueError(f"stop_strings must be a sequence of strings that are not empty: {request.stop_strings!r}")
    if request.stop_strings and tokenizer is None:
        raise ValueError("stop_strings are found in the text, so the engine needs a tokenizer: Engine(…, tokenizer=…)")
    if request.prompt_length + request.max_new_tokens > context_length:
        raise ValueError(
            f"prompt of {request.prompt_length} tokens + {request.max_new_tokens} new ones: both together may have at "
            f"most {context_length} tokens, {length_rule}; shorten the prompt or lower max_new_tokens"
        )
    return dataclasses.replace(
        request,
        stop_ids=stop_ids,
        stop_strings=tuple(request.stop_strings),
        max_new_tokens=int(request.max_new_tokens),
        seed=int(request.seed),
        logit_bias=checked_bias(request.logit_bias, config.vocab_size),
        top_log_probs=int(request.top_log_probs),
    )


def checked_bias(bias: Mapping[int, float], vocab_size: int) -> dict[int, float]:
    """The field `logit_bias` with plain numbers.

    Raises:
      ValueError: there are too many, or one has an id outside the vocabulary or a number out of range.
    """
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must be numbers by token id, found {type(bias).__name__}")
    if len(bias) > MOST_BIASES:
        raise ValueError(f"logit_bias may have {MOST_BIASES} tokens at most, found {len(bias)}")
    ids = check_ids(list(bias), "logit_bias", vocab_size)
    for token, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not abs(value) <= LARGEST_BIAS:
            raise ValueError(f"logit_bias of {token} must be from {-LARGEST_BIAS} to {LARGEST_BIAS}, found {value!r}")
    return dict(zip(ids, map(float, bias.values()), strict=True))


def _checked_embeddings(request: Request, prompt: tuple[int, ...], hidden_size: int) -> dict:
    """The fields `embeddings` and `embedding_positions`: float32 [n, hidden] and n integers, or None and None."""
    if request.embeddings is None:
        if request.embedding_positions is not None:
            raise ValueError("embedding_positions say where embeddings go: give embeddings, too")
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        return {}
    values = np.asarray(request.embeddings)
    if values.ndim != 2 or not len(values) or values.shape[1] != hidden_size:
        raise ValueError(
            f"embeddings must be [n, {hidden_size}] with n of at least 1, {hidden_size} being the model's hidden size; "
            f"found {list(values.shape)}"
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("embeddings have numbers that are not finite")
    if request.embedding_positions is None:
        if prompt:
            raise ValueError(
                "a prompt of tokens and of embeddings needs embedding_positions: where the embeddings go; leave the "
                "prompt empty if they are the whole of it"
            )
        return {"embeddings": values, "embedding_positions": tuple(range(len(values)))}
    positions = check_ids(request.embedding_positions, "embedding_positions", len(prompt), "a position of the prompt")
    if len(set(positions)) != len(positions) or len(positions) != len(values):
        raise ValueError(
            f"embedding_positions must be one position for each of the {len(values)} embeddings, all different; found "
            f"{len(positions)}, {len(set(positions))} of them different"
        )
    return {"embeddings": values, "embedding_positions": positions}


def check_ids(ids: Sequence[int], name: str, limit: int, what: str = "an id of the model") -> tuple[int, ...]:
    """Integers in [0, limit) as a tuple.

    Raises:
      ValueError: they are none; `name` says where they were found, `what` they must be.
    """
    if isinstance(ids, str | bytes):
        raise ValueError(f"{name} must be token ids, found text: encode it with the model's tokenizer first")
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{name} must be token ids of one row, found an array of shape {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, found {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() < limit:
        wrong = int(array[(array < 0) | (array >= limit)][0])
        if what == "an id of the model":
            raise ValueError(f"{name} has the id {wrong}, outside [0, {limit}) of the model: another tokenizer's?")
        raise ValueError(f"{name} has {wrong}, which is not {what}: expected [0, {limit})")
    return tuple(array.tolist())
