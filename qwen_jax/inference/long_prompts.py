"""Programs for long prompts: in chunks, right in their rows of the batch, between steps of the others.

`extend` computes a chunk, `paste` puts what the prefix cache has before it, and `begin` makes the rows go on.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_jax.inference.programs import BLOCK_TOKENS, BatchState, on_mesh
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.decoding import DecodingCache, decode_branches, decoding_logits
from qwen_jax.models.positions import dynamic_ntk_alpha
from qwen_jax.models.transformer import InputEmbeddings

# Slots that are copied at once.
_COPIED = 1024


@on_mesh(static=("config",), donated=("state",))
def extend(
    config: ModelConfig,
    params,
    state: BatchState,
    tokens: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    embeddings: InputEmbeddings | None = None,
) -> tuple[BatchState, jax.Array]:
    """Computes the next tokens of prompts in their rows of the batch: no memory but for the activations of so many.

    Until `begin`, such a row is not active. What `generate` then writes into it lies in the slot after these tokens,
    where the next ones will be.

    Args:
      params: as `unstack_layers` gives them.
      tokens: int32 [n, chunk], those of each prompt from `starts` on, filled up at the end.
      rows: int32 [n]. A row may be named twice, with the same tokens.
      starts: int32 [n]; start + chunk is within the slots.
      lengths: int32 [n], of the whole prompts.
      embeddings: vectors in the place of some of the tokens' embeddings, or None.

    Returns:
      (state, float32 logits [n, vocabulary] for the token after each prompt that ends among these tokens).
    """
    count, chunk = tokens.shape
    alpha = jnp.ones(count, jnp.float32)
    if config.use_dynamic_ntk:
        alpha = dynamic_ntk_alpha(lengths, config.context_length)
    positions = starts[:, None] + jnp.arange(chunk)
    ends = jnp.full((count, chunk), chunk, jnp.int32)  # each sees all before it
    cache = DecodingCache(tuple(layer.of_rows(rows) for layer in state.cache.layers), alpha)
    hidden, cache = decode_branches(config, params, tokens, positions, ends, cache, embeddings)
    at = jnp.clip(lengths - 1 - starts, 0, chunk - 1)
    logits = decoding_logits(config, params, jnp.take_along_axis(hidden, at[:, None, None], axis=1))[:, 0]
    layers = tuple(layer.of_rows(None) for layer in cache.layers)
    after = jnp.minimum(starts + chunk, state.cache.slots - 1)
    return (
        dataclasses.replace(
            state,
            cache=DecodingCache(layers, state.cache.ntk_alpha.at[rows].set(alpha)),
            position=state.position.at[rows].set(after),
        ).placed(),
        logits,
    )


@on_mesh(donated=("state",))
def paste(
    state: BatchState, pool: tuple[KVCache, ...], rows: jax.Array, blocks: jax.Array, lengths: jax.Array
) -> BatchState:
    """Puts prefixes from a pool into rows of the batch; `extend` goes on with them, and says what lies after them.

    Args:
      pool, blocks, lengths: as in `CachedPrefixes`, for n prompts.
      rows: int32 [n]. A row may be named twice, with the same prefix.
    """
    size = min(_COPIED, state.cache.slots)
    count = size // BLOCK_TOKENS

    def copy(number, layers):
        places = jax.lax.dynamic_slice_in_dim(blocks, number * count, count, axis=1)
        starts = jnp.full_like(rows, number * size)

        def gather(whole):
            found = whole.at[places].get(mode="fill", fill_value=0).swapaxes(1, 2)
            return found.reshape(len(rows), whole.shape[1], size, whole.shape[3])

        return tuple(
            layer.of_rows(rows).write(starts, gather(of.key), gather(of.value)).of_rows(None)
            for layer, of in zip(layers, pool, strict=True)
        )

    layers = jax.lax.fori_loop(0, (jnp.max(lengths) + size - 1) // size, copy, state.cache.layers)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, layers=layers),
        position=state.position.at[rows].set(lengths),  # not what the row's last request has left
    ).placed()


@on_mesh(donated=("state",))
def begin(
    state: BatchState,
    token: jax.Array,
    lengths: jax.Array,
    seen: jax.Array,
    rows: jax.Array,
    sources: jax.Array | None = None,
) -> BatchState:
    """Makes rows whose prompts `extend` has computed ready for `generate`.

    Args:
      token, lengths, seen: what `first_tokens` took and gave, for n rows.
      rows: int32 [n]. A row may be named twice, with the same content.
      sources: int32 [n], the rows that have the keys and values of each row's prompt; None: each its own.
    """
    cache = state.cache
    if sources is not None:
        size = min(_COPIED, cache.slots)

        def copy(number, layers):
            starts = jnp.full_like(rows, number * size)
            return tuple(
                layer.of_rows(rows).write(starts, *layer.of_rows(sources).block(number * size, size)).of_rows(None)
                for layer in layers
            )

        layers = jax.lax.fori_loop(0, (jnp.max(lengths) + size - 1) // size, copy, cache.layers)
        cache = DecodingCache(layers, cache.ntk_alpha.at[rows].set(cache.ntk_alpha[sources]))
    counts = state.counts
    return BatchState(
        cache,
        state.token.at[rows].set(token),
        state.position.at[rows].set(lengths),
        state.seen.at[rows].set(seen),
        None if counts is None else counts.at[rows].set(0).at[rows, token].set(1),
    ).placed()
