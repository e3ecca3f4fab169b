"""Causal attention by XLA operations, in blocks of queries, with a backward pass of its own: for any platform.

As in FlashAttention-2 (Dao 2023), the backward pass computes the weights again from the saved log-normalizers, so no
[length, length] array outlives its block; blocks of keys that no query of a block may see are left out.

Einsum letters: b batch, k kv_heads, g query heads of each, l queries, m keys, d head_dim.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.models.ops import product

# More and smaller blocks skip more of the scores above the diagonal, and make longer programs.
_MOST_BLOCKS = 8
_LEAST_QUERIES = 128


@jax.custom_vjp
def blockwise_attention(query, key, value, segment_ids=None) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value over the positions at or before each, within its segment.

    Args:
      query: [batch, heads, length, head_dim].
      key, value: [batch, kv_heads, length, head_dim]; query head h reads kv head h // (heads / kv_heads).
      segment_ids: int32 [batch, length], or None.

    Returns:
      [batch, heads, length, head_dim] in the dtype of `query`. The softmax is computed in float32.
    """
    return _forward(query, key, value, segment_ids)[0]


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of each block of queries: equal sizes that divide the length."""
    count = next(n for n in range(max(1, min(_MOST_BLOCKS, length // _LEAST_QUERIES)), 0, -1) if length % n == 0)
    size = length // count
    return [(start, start + size) for start in range(0, length, size)]


def _scores(query, key, start: int, segment_ids) -> jax.Array:
    """Scaled and masked float32 [batch, kv_heads, group, queries, keys] of the queries from `start` on."""
    queries, keys = query.shape[3], key.shape[2]
    scores = product("bkgld,bkmd->bkglm", query, key, jnp.float32) * (query.shape[-1] ** -0.5)
    mask = start + jnp.arange(queries)[:, None] >= jnp.arange(keys)[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, start : start + queries, None] == segment_ids[:, None, :keys])[:, None, None]
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _grouped(x, kv_heads: int):
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _forward(query, key, value, segment_ids):
    grouped = _grouped(query, key.shape[1])
    outputs, log_normalizers = [], []
    for start, stop in _blocks(query.shape[2]):
        scores = _scores(grouped[:, :, :, start:stop], key[:, :, :stop], start, segment_ids)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        normalizer = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = product("bkglm,bkmd->bkgld", weights.astype(value.dtype), value[:, :, :stop], jnp.float32)
        outputs.append((mixed / normalizer).astype(query.dtype))
        log_normalizers.append(highest + jnp.log(normalizer))
    output = checkpoint_name(jnp.concatenate(outputs, axis=3).reshape(query.shape), "attention")
    log_normalizer = checkpoint_name(jnp.concatenate(log_normalizers, axis=3), "attention")
    return output, (query, key, value, segment_ids, output, log_normalizer)


def _backward(residuals, gradient):
    query, key, value, segment_ids, output, log_normalizer = residuals
    dtype = query.dtype
    query, output, gradient = (_grouped(x, key.shape[1]) for x in (query, output, gradient))
    # What the softmax's own backward pass subtracts: the sum of weight times its gradient, over keys.
    mean = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    query_gradients = []
    key_gradient, value_gradient = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for start, stop in _blocks(query.shape[3]):
        block, block_gradient = (x[:, :, :, start:stop] for x in (query, gradient))
        scores = _scores(block, key[:, :, :stop], start, segment_ids)
        weights = jnp.exp(scores - log_normalizer[:, :, :, start:stop])
        error = product("bkgld,bkmd->bkglm", block_gradient, value[:, :, :stop], jnp.float32)
        error = (weights * (error - mean[:, :, :, start:stop]) * (query.shape[-1] ** -0.5)).astype(dtype)
        query_gradients.append(product("bkglm,bkmd->bkgld", error, key[:, :, :stop]))
        key_gradient = key_gradient.at[:, :, :stop].add(product("bkglm,bkgld->bkmd", error, block, jnp.float32))
        value_gradient = value_gradient.at[:, :, :stop].add(
            product("bkglm,bkgld->bkmd", weights.astype(dtype), block_gradient, jnp.float32)
        )
    query_gradient = jnp.concatenate(query_gradients, axis=3)
    heads_first = (query.shape[0], -1, *query.shape[3:])
    return query_gradient.reshape(heads_first), key_gradient.astype(dtype), value_gradient.astype(dtype), None


blockwise_attention.defvjp(_forward, _backward)
