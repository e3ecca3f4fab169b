"""What continues prompts in batches: the engine of a checkpoint, or a server of OpenAI's protocol."""

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.data import chatml

if TYPE_CHECKING:
    from qwen_jax.inference import Engine

# (prompts, seeds of their sampling) to one reply for each, without what ended it; None where the prompt and the longest
# reply do not fit into the context of the model.
Completer = Callable[[Sequence[str], Sequence[int]], Sequence[str | None]]
_TRIES = 5
# Word of OpenAI's protocol for a prompt that does not fit.
_TOO_LONG = "context_length_exceeded"


def engine_completer(
    engine: "Engine",
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> Completer:
    """Continues by an engine with a tokenizer. Names of control tokens in prompts stay text.

    Args:
      chat: a prompt is the first message of a user, in ChatML, and the reply that of the assistant.
    """
    from qwen_jax.inference import Request, SamplingConfig  # loads JAX, which a server's client does not need

    sampling = SamplingConfig(temperature=temperature, top_p=top_p)
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # as the docstring asks

    def encode(prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        return chatml.encode_prompt(tokenizer, messages) if chat else tokenizer.encode(prompt)

    ends = (tokenizer.endoftext_id, tokenizer.im_end_id)

    def complete(prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        encoded = [(encode(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        room = engine.context_length - max_new_tokens
        fitting = [place for place, (ids, _) in enumerate(encoded) if len(ids) <= room]
        requests = [
            Request(ids, max_new_tokens, sampling, ends, tuple(stop), seed)
            for ids, seed in (encoded[place] for place in fitting)
        ]
        replies: list[str | None] = [None] * len(encoded)
        for result in engine.generate(requests):
            replies[fitting[result.index]] = result.text or ""
        return replies

    return complete


def server_completer(
    url: str,
    model: str,
    *,
    api_key: str = "none",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    chat: bool = False,
    at_once: int = 8,
) -> Completer:
    """Continues by `/v1/completions` of a server, a few prompts at once.

    Args:
      chat: by `/v1/chat/completions`; a prompt is the message of a user.
      url: of the server, with or without `/v1`.
      model: a name that the server knows.

    Raises:
      ModuleNotFoundError: the package openai is not installed.

    The completer raises OSError where the server refuses, or is not there after a few tries; the message has its
    address.
    """
    import openai

    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    options: dict[str, Any] = {
        "model": model,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": list(stop) or None,
    }
    client: Any = openai.OpenAI(base_url=base, api_key=api_key, max_retries=0)

    def one(prompt: str, seed: int) -> str | None:
        for attempt in itertools.count(1):
            try:
                if chat:
                    messages = [{"role": "user", "content": prompt}]
                    said = client.chat.completions.create(messages=messages, seed=seed, **options)
                    return said.choices[0].message.content or ""
                return client.completions.create(prompt=prompt, seed=seed, **options).choices[0].text
            except (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError) as error:
                if attempt == _TRIES:
                    raise OSError(f"{base}: {error}") from error
                time.sleep(2**attempt)
            except openai.OpenAIError as error:
                if getattr(error, "code", None) == _TOO_LONG:
                    return None
                raise OSError(f"{base}: {error}") from error
        raise AssertionError  # the loop has no end

    def complete(prompts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, prompts, seeds))

    return complete
