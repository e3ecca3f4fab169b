"""Token-by-token generation with a key-value cache: one program for the prompt, one for every further token."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from qwen_jax.inference.sampling import SamplingConfig, sample
from qwen_jax.models.attention import KVCache
from qwen_jax.models.transformer import Qwen

_SMALLEST_BUCKET = 64


def bucket(length: int, limit: int) -> int:
    """The padded length that `length` is computed with: powers of two, so that few programs are compiled."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, limit)


class Generator:
    """Generates continuations of one prompt at a time.

    A program is compiled for each bucket of prompt lengths and each size of cache; further calls reuse them.
    """

    def __init__(self, model: Qwen, params, sampling: SamplingConfig = SamplingConfig()):
        """Weights are cast to the compute dtype once: a decoding step is bound by reading them."""
        self.model, self.sampling = model, sampling
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, model.config.compute_dtype), params)
        self._prefill = jax.jit(self._prefill_step, static_argnums=(3,))
        self._decode = jax.jit(self._decode_step, donate_argnums=(2,))

    def _next_token(self, params, hidden, key):
        logits = self.model.apply({"params": params}, hidden, method=Qwen.logits)
        return sample(logits[:, -1], key, self.sampling)

    def _prefill_step(self, params, tokens, length, slots, key):
        """Tokens [1, bucket], of which `length` are the prompt, to (next token [1], cache of `slots` positions).

        Padding writes into slots after the prompt; each is overwritten before a position can see it. Dynamic NTK goes
        by `length`, so the size of the bucket changes no token.
        """
        positions = jnp.arange(tokens.shape[1])[None]
        cache = KVCache.empty(self.model.config, 1, slots, jnp.reshape(length, 1))
        hidden, cache = self.model.apply({"params": params}, tokens, positions, cache, method=Qwen.decode)
        last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
        return self._next_token(params, last, key), cache

    def _decode_step(self, params, token, cache, position, key):
        """Token [1] at `position` to (next token [1], cache)."""
        hidden, cache = self.model.apply(
            {"params": params}, token[:, None], position[None, None], cache, method=Qwen.decode
        )
        return self._next_token(params, hidden, key), cache

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = (), seed: int = 0
    ) -> Iterator[int]:
        """Yields new token ids as they come; a stop id ends it and is not yielded.

        Args:
          prompt: token ids, at least one.
          max_new_tokens: at most so many are yielded.
          stop_ids: ids that end the generation.
          seed: of the draws.

        Raises:
          ValueError: the prompt is empty, has an id outside the vocabulary, or leaves no room below the model's
            `inference_length`: max_length, or eight times that with dynamic NTK.
        """
        config = self.model.config
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(f"the prompt has a token id outside [0, {config.vocab_size}): is it another tokenizer's?")
        total = len(prompt) + max_new_tokens
        if max_new_tokens < 1 or total > config.inference_length:
            limit = f"the model's max_length of {config.max_length}"
            if config.use_dynamic_ntk:
                limit = f"{config.inference_length}, which dynamic NTK makes of {limit}"
            raise ValueError(
                f"prompt of {len(prompt)} tokens + {max_new_tokens} new ones: new ones must be at least 1, and both "
                f"together at most {limit}"
            )
        return self._stream(list(prompt), max_new_tokens, frozenset(stop_ids), jax.random.key(seed))

    def _stream(self, prompt, max_new_tokens, stop_ids, key):
        limit = self.model.config.inference_length
        length = len(prompt)
        padded = jnp.asarray([prompt + [0] * (bucket(length, limit) - length)], jnp.int32)
        slots = bucket(length + max_new_tokens, limit)
        token, cache = self._prefill(self.params, padded, length, slots, jax.random.fold_in(key, 0))
        for index in range(max_new_tokens):
            current = int(token[0])
            if current in stop_ids:
                return
            yield current
            if index + 1 < max_new_tokens:
                position = jnp.asarray(length + index, jnp.int32)
                token, cache = self._decode(self.params, token, cache, position, jax.random.fold_in(key, index + 1))

    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return self._prefill._cache_size() + self._decode._cache_size()
