"""What an agent may stand on: an engine in this process, or a server of OpenAI's protocol."""

import itertools
from collections.abc import Iterator, Sequence

from qwen_jax.agents import react
from qwen_jax.agents.agent import Complete
from qwen_jax.data import chatml
from qwen_jax.data.react import Said
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.inference import Engine, Request, SamplingConfig
from qwen_jax.inference.requests import LENGTH


def _cut(tokens: int) -> ValueError:
    """The error of a reply that `max_new_tokens` ended: half a call is none, and half an answer no answer."""
    return ValueError(f"a reply was cut after {tokens} tokens: allow more of them")


def of_engine(
    engine: Engine, *, sampling: SamplingConfig = SamplingConfig(), max_new_tokens: int = 512, seed: int = 0
) -> Complete:
    """Completes with an engine that has a tokenizer; greedily by default.

    Args:
        max_new_tokens: the largest number of tokens of a reply; fewer where the context has less room. A reply that
            has more raises ValueError, after its text.
        seed: for sampling; each reply has one of its own, from this one on.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # as the docstring asks
    seeds = itertools.count(seed)

    def complete(said: Sequence[Said], stops: Sequence[str]) -> Iterator[str]:
        ids = react.encode(tokenizer, said)
        room = engine.context_length - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation takes {len(ids)} tokens, and the context has {engine.context_length}: ask anew, "
                "with fewer tools, or limit the results of tools"
            )
        request = Request(
            ids, min(max_new_tokens, room), sampling, chatml.stop_ids(tokenizer), tuple(stops), next(seeds) % 2**32
        )
        for chunk in engine.stream(request):
            yield chunk.text or ""
            if chunk.finish_reason == LENGTH:
                raise _cut(request.max_new_tokens)

    return complete


def of_client(client, model: str, tokenizer: Tokenizer, *, max_tokens: int = 512, temperature: float = 0.0) -> Complete:
    """Completes by `/v1/completions` of a server that takes token ids, as ours and vLLM's do.

    Args:
        client: an `openai.OpenAI`.
        model: its name on the server.
        tokenizer: of the model. The prompt goes as ids, so that no text in it becomes a control token.
        max_tokens: see `max_new_tokens` of `of_engine`.
    """

    def complete(said: Sequence[Said], stops: Sequence[str]) -> Iterator[str]:
        chunks = client.completions.create(
            model=model,
            prompt=react.encode(tokenizer, said),
            stop=list(stops),
            max_tokens=max_tokens,
            temperature=temperature,
            stream=True,
        )
        for chunk in chunks:
            for choice in chunk.choices:
                yield choice.text or ""
                if choice.finish_reason == "length":
                    raise _cut(max_tokens)

    return complete
