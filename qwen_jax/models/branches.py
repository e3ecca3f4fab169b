"""Attention of texts that lie side by side in a row and go on after the same cached tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.models.cache import KVCache
from qwen_jax.models.ops import matmul_precision
from qwen_jax.sharding import platform

# Keys that are multiplied at a time. On CPUs the scores of a block then stay near the cores.
KEY_BLOCK, CPU_KEY_BLOCK = 512, 128


class Branches(NamedTuple):
    """What the tokens of a step see, which follow the cached ones of their row.

    The texts of a row may branch again and again: a row has the tokens of a tree of prefixes, depth first. A token sees
    those on its path.

    Attributes:
      starts: int32 [batch], number of tokens that the cache holds, all of which are seen.
      ends: int32 [batch, length]: token i is seen by the tokens i … ends[i] - 1 of the step.
    """

    starts: jax.Array
    ends: jax.Array


def branch_attention(
    query: jax.Array,
    cache: KVCache,
    branches: Branches,
    positions: jax.Array,
    window: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value over the tokens that each one sees, block by block of the cache.

    As in FlashAttention (Dao et al. 2022), no array has the scores of all keys. Slots after the last token in use are
    not read, and the program is the same for any number of cached tokens.

    Args:
      query: [batch, heads, length, head_dim].
      cache: holds the tokens of the step, too, from `starts` on.
      positions: int32 [batch, length], of each token in its text.
      window: int32 scalar, number of positions, its own included, that a query sees; None: all.

    Returns:
      [batch, heads, length, head_dim] in the dtype of `query`; the softmax is computed in float32.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, slots = cache.key.shape[1:3]
    block = min(CPU_KEY_BLOCK if platform() == "cpu" else KEY_BLOCK, slots)
    precision = matmul_precision(query.dtype)
    # b batch, k kv_heads, g query heads of each, l length, m keys of a block, d head_dim.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    index = jnp.arange(length)[None, :, None]

    def seen(first: jax.Array) -> jax.Array:
        """Bool [batch, length, block]: the slots from `first` on that each token sees."""
        slot = first + jnp.arange(block)[None]
        place = slot - branches.starts[:, None]  # of the key in the step; negative: in the cache before
        of_step = jnp.clip(place, 0, length - 1)
        until = jnp.take_along_axis(branches.ends, of_step, axis=1)
        mask = (place[:, None] < 0) | ((place[:, None] <= index) & (index < until[:, None]))
        if window is None:
            return mask
        key_positions = jnp.where(place < 0, slot, jnp.take_along_axis(positions, of_step, axis=1))
        return mask & (positions[:, :, None] - key_positions[:, None] < window)

    def add(number: jax.Array, carry):
        highest, normalizer, mixed = carry
        # The last block may reach back into the one before.
        first = jnp.minimum(number * block, slots - block)
        keys, values = cache.block(first, block)
        scores = jnp.einsum(
            "bkgld,bkmd->bkglm", grouped, keys, precision=precision, preferred_element_type=jnp.float32
        ) * (head_dim**-0.5)
        fresh = first + jnp.arange(block) >= number * block
        scores = jnp.where((seen(first) & fresh)[:, None, None], scores, jnp.finfo(jnp.float32).min)
        new = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        product = jnp.einsum(
            "bkglm,bkmd->bkgld",
            weights.astype(query.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new, normalizer * before + jnp.sum(weights, axis=-1), mixed * before[..., None] + product

    none = jnp.full(grouped.shape[:-1], jnp.finfo(jnp.float32).min, jnp.float32)
    carry = (none, jnp.zeros_like(none), jnp.zeros(grouped.shape, jnp.float32))
    blocks = (jnp.minimum(jnp.max(branches.starts) + length, slots) + block - 1) // block
    _, normalizer, mixed = jax.lax.fori_loop(0, blocks, add, carry)
    return (mixed / normalizer[..., None]).astype(query.dtype).reshape(query.shape)
