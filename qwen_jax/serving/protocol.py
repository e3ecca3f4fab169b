"""Bodies of requests to requests of the engine (OpenAI's API reference: chat completions and completions)."""

import dataclasses
import functools
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.agents.react import STOP
from qwen_jax.data.chatml import DEFAULT_SYSTEM, stop_ids
from qwen_jax.data.content import NUM_QUERIES, Reference, pictures
from qwen_jax.data.conversations import Message, Unusable, from_openai
from qwen_jax.data.react import DEFAULT_STYLE
from qwen_jax.inference import Request, SamplingConfig
from qwen_jax.inference.requests import check_ids, checked_bias
from qwen_jax.inference.sampling import MOST_LIKELY
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.serving import fields
from qwen_jax.serving.errors import CONTEXT_LENGTH, ApiError, bad_request
from qwen_jax.serving.formats import constraint_of, read_format
from qwen_jax.serving.known_fields import check_chat, check_completion
from qwen_jax.serving.pictures import check_pictures, decoded, read_content, read_text
from qwen_jax.serving.prompts import AUTO, chat_prompt
from qwen_jax.serving.tools import MAX_TOOLS, read_choice, read_tools

if TYPE_CHECKING:
    from qwen_jax.inference.grammars import Grammars

# Log-probabilities of prompts in one answer. Each takes some 200 bytes (tracemalloc) until the answer is written.
MOST_ECHOED = 1_000_000
_SEEDS = 2**32
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served, as far as requests are read by it.

    Attributes:
        model: name of the model.
        tokenizer: of the engine.
        vocab_size: number of ids of the model.
        context_length: of the engine.
        capacity: the largest number of continuations of one request.
        sampling: where a request says nothing.
        system: system message of a conversation without one.
        tool_style: how tools are described, one of `qwen_jax.data.react.TRAINED_STYLES`.
        vision: of the model; None: it reads text alone.
        max_images: the largest number of pictures of a request.
        max_image_pixels: the largest width times height of one.
    """

    model: str
    tokenizer: Any
    vocab_size: int
    context_length: int
    capacity: int
    sampling: SamplingConfig = SamplingConfig(temperature=1.0)
    system: str = DEFAULT_SYSTEM
    tool_style: str = DEFAULT_STYLE
    vision: VisionConfig | None = None
    max_images: int = 16
    max_image_pixels: int = 20_000_000

    @functools.cached_property
    def most_characters(self) -> int:
        """A text of more characters cannot fit into the context, even where four become one by normalization."""
        return 4 * self.context_length * max(map(len, self.tokenizer.mergeable_ranks))

    @functools.cached_property
    def grammars(self) -> "Grammars":
        """Makes the constraints of replies."""
        from qwen_jax.inference.grammars import Grammars  # in here: few servers are asked for any

        return Grammars(self.tokenizer, stop_ids(self.tokenizer), self.vocab_size)


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of a client.

    Attributes:
        requests: one for each choice of the answer, those of one prompt side by side.
        chat: whether it is a chat completion.
        stream, include_usage, logprobs: the fields of that name.
        top_log_probs: how many of the most probable tokens are told with each token.
        opening: text before the reply that was written for the model, see `Prompt`.
        tools: JSON schema of the parameters, by name, of the tools that a reply may call; None: replies are plain text.
        held: whether `requests` are constrained so that a whole reply that calls a tool fits its schema.
        echo: whether a choice begins with the prompt. Then `max_new_tokens` of the requests may be 0.
        ignored: names of the fields that are left out of account.
    """

    requests: tuple[Request, ...]
    chat: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    top_log_probs: int = 0
    opening: str = ""
    tools: Mapping[str, Any] | None = None
    held: bool = False
    echo: bool = False
    ignored: tuple[str, ...] = ()


def parse_chat(body: Mapping, served: Served) -> Job:
    """A job of the body of `/v1/chat/completions`.

    Raises:
        ApiError: the body is not one that this server answers.
    """
    _check_model(body, served)
    ignored = check_chat(body)
    tools = read_tools(body)
    choice = read_choice(body, tools)
    form = read_format(body)
    if not isinstance(body.get("messages"), list):
        raise bad_request("messages", f"must be a list of messages, found {fields.shown(body.get('messages'))}")
    read = read_text if served.vision is None else read_content
    try:
        conversation = from_openai({"messages": body["messages"], "tools": list(tools)}, read)
    except (Unusable, ValueError) as error:
        raise bad_request("messages", str(error)) from None
    messages = conversation.messages
    for number, (given, message) in enumerate(zip(body["messages"], messages, strict=True)):
        if given.get("content") is None and message.role in ("user", "system"):
            raise bad_request("messages", f"message {number}: a message of role {given['role']!r} needs content")
    check_pictures(conversation, served.max_images)
    _check_size(sum(_characters(message) for message in messages), "messages", served)
    if any(len(message.calls) > MAX_TOOLS for message in messages):
        raise bad_request("messages", f"a message may have {MAX_TOOLS} calls at most")
    # Each takes some tokens.
    turns = sum(
        1 + len(message.calls) + sum(not isinstance(part, str) for part in message.parts) for message in messages
    )
    if turns > served.context_length:
        raise _too_long("messages", f"{turns} messages, calls, pictures and regions", served)
    shown = [picture for message in messages for picture in pictures(message.parts)]
    queries = served.vision.num_queries if served.vision is not None else NUM_QUERIES
    prompt = chat_prompt(served.tokenizer, conversation, choice, served.system, served.tool_style, queries)
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    schemas = {name: schemas[name] for name in prompt.tools}
    constraint = constraint_of(form, choice, prompt, schemas, lambda: served.grammars)
    stops = fields.stop_strings(body)
    if constraint is None and (prompt.tools or prompt.opening):
        stops = (*stops, STOP)
    logprobs = fields.flag(body, "logprobs")
    top = fields.integer(body, "top_logprobs", 0, MOST_LIKELY) or 0
    if top and not logprobs:
        raise bad_request("top_logprobs", "needs logprobs to be true")
    requests = _requests(body, [prompt.ids], "messages", stops, top, served)
    if shown and served.vision is not None:  # last, as it costs most
        images = decoded(shown, served.vision, served.max_image_pixels)
        requests = tuple(dataclasses.replace(request, images=images) for request in requests)
    if constraint is not None:
        requests = tuple(dataclasses.replace(request, constraint=constraint) for request in requests)
    calls = schemas if prompt.tools or prompt.opening else None
    held = form is not None and choice.mode == AUTO and bool(prompt.tools)
    return Job(requests, True, *_form(body), logprobs, top, prompt.opening, calls, held, ignored=ignored)


def parse_completion(body: Mapping, served: Served) -> Job:
    """A job of the body of `/v1/completions`: `prompt` is text, token ids, or a list of either.

    Raises:
        ApiError: the body is not one that this server answers.
    """
    _check_model(body, served)
    ignored = check_completion(body)
    given = body.get("prompt")
    many = isinstance(given, list) and bool(given) and all(isinstance(one, str | list) for one in given)
    prompts = given if isinstance(given, list) and many else [given]
    if len(prompts) > served.capacity:
        raise bad_request("prompt", f"there may be {served.capacity} prompts at most, found {len(prompts)}")
    ids = [_prompt_ids(one, served) for one in prompts]
    # Here it is a number; False is what some clients send for none.
    top = None if body.get("logprobs") is False else fields.integer(body, "logprobs", 0, MOST_LIKELY)
    echo = fields.flag(body, "echo")
    requests = _requests(body, ids, "prompt", fields.stop_strings(body), top or 0, served, least=0 if echo else 1)
    told = sum(len(request.prompt) for request in requests) * (1 + (top or 0)) if echo and top is not None else 0
    if told > MOST_ECHOED:
        raise bad_request(
            "logprobs",
            f"the echo would tell {told:,} log-probabilities, at most {MOST_ECHOED:,} are told: send fewer prompts at "
            "once, or ask for fewer alternatives",
        )
    return Job(requests, False, *_form(body), top is not None, top or 0, echo=echo, ignored=ignored)


def _prompt_ids(given: object, served: Served) -> Sequence[int]:
    if isinstance(given, str) and given:
        _check_size(len(given), "prompt", served)
        return served.tokenizer.encode(given)
    if isinstance(given, list) and given and all(type(one) is int for one in given):
        try:
            return check_ids(given, "prompt", served.vocab_size)
        except (ValueError, OverflowError) as error:
            raise bad_request("prompt", str(error)) from None
    raise bad_request("prompt", f"must be text or token ids, not empty, or a list of them, found {fields.shown(given)}")


def _check_model(body: Mapping, served: Served) -> None:
    if body.get("model") not in (None, served.model):
        name = fields.shown(body["model"])
        message = f"the model {name} is not served here; the one that is has the name {served.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _characters(message: Message) -> int:
    """Number of characters of the texts of a message."""
    texts = (part.text if isinstance(part, Reference) else part for part in message.parts)
    return len(message.content) + sum(len(text) for text in texts if isinstance(text, str))


def _check_size(characters: int, param: str, served: Served) -> None:
    """Refuses text that cannot fit before it is encoded."""
    if characters > served.most_characters:
        raise _too_long(param, f"{characters} characters", served)


def _too_long(param: str, found: str, served: Served) -> ApiError:
    return bad_request(
        param,
        f"{found}: prompt and continuation together may have at most {served.context_length} tokens; shorten the "
        "prompt or lower max_tokens",
        CONTEXT_LENGTH,
    )


def _form(body: Mapping) -> tuple[bool, bool]:
    """Whether to stream, and whether a last chunk tells the usage."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise bad_request("stream_options", f"must be an object, found {fields.shown(options)}")
    return fields.flag(body, "stream"), fields.flag(options or {}, "include_usage")


def _requests(
    body: Mapping,
    prompts: Sequence[Sequence[int]],
    param: str,
    stops: Sequence[str],
    top: int,
    served: Served,
    least: int = 1,
) -> tuple[Request, ...]:
    """`n` requests of at least `least` new tokens for each prompt, which differ in their seeds."""
    count = fields.integer(body, "n", 1, served.capacity // len(prompts)) or 1
    limits = [fields.integer(body, name, least) for name in ("max_completion_tokens", "max_tokens")]
    most = next((limit for limit in limits if limit is not None), None)
    needed = 1 if most is None else most
    seed = fields.integer(body, "seed", -(2**63), 2**64)
    seed = secrets.randbits(32) if seed is None else seed
    sampling, bias = _sampling(body, served.sampling), _bias(body, served.vocab_size)
    requests = []
    for ids in prompts:
        room = served.context_length - len(ids)
        if room < needed:
            raise _too_long(param, f"prompt of {len(ids)} tokens + {needed} new ones", served)
        for _ in range(count):
            requests.append(
                Request(
                    ids,
                    room if most is None else most,
                    sampling,
                    stop_ids(served.tokenizer),
                    tuple(stops),
                    (seed + len(requests)) % _SEEDS,
                    logit_bias=bias,
                    top_log_probs=top,
                )
            )
    return tuple(requests)


def _sampling(body: Mapping, default: SamplingConfig) -> SamplingConfig:
    top_k = fields.integer(body, "top_k", -1, 2**31 - 1)
    values = {name: fields.number(body, name, getattr(default, name)) for name in _NUMBERS}
    try:
        # Other servers take -1, too, for all tokens.
        return SamplingConfig(**values, top_k=default.top_k if top_k is None else max(top_k, 0))
    except (ValueError, OverflowError) as error:
        name = next((name for name in values if str(error).startswith(name)), None)
        raise bad_request(name, str(error).removeprefix(f"{name} ")) from None


def _bias(body: Mapping, vocab_size: int) -> dict[int, float]:
    """The field `logit_bias`: numbers by token id, which JSON writes as text."""
    given = body.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise bad_request("logit_bias", f"must be an object of numbers by token id, found {fields.shown(given)}")
    try:
        return checked_bias({_id(name): value for name, value in given.items()}, vocab_size)
    except (ValueError, OverflowError) as error:
        raise bad_request("logit_bias", str(error).removeprefix("logit_bias ")) from None


def _id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise ValueError(f"must have token ids as names, found {fields.shown(name)}")
    return int(name)
