"""Causal self-attention: the projections around the kernel, and rotary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.models.branches import Branches, branch_attention
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.kernels import causal_attention, dot_product_attention
from qwen_jax.models.layers import Projection
from qwen_jax.models.positions import ContextExtension, rotate
from qwen_jax.sharding import constrain


class SelfAttention(nn.Module):
    """Multi-head (or grouped-query) causal attention with rotary positions and biases on Q, K and V."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x,
        angles,
        segment_ids,
        mask,
        *,
        deterministic,
        layer: jax.Array | int,
        cache: KVCache | None,
        positions: jax.Array,
        extension: ContextExtension | None,
    ):
        """Attends within `x`, or, given a cache, to all positions of the cache up to each one.

        Without a mask it is a training pass, and the configuration's kernel runs.

        Args:
          x: [batch, length, hidden].
          angles: (cos, sin) of the positions, each [batch, length, head_dim / 2].
          segment_ids: int32 [batch, length] or None, in a training pass.
          mask: bool [1 or batch, length, keys], keys being `length`, or the slots of the cache; or the `Branches` of
            texts that go on from the cache. None: a training pass.
          layer, positions: index of this layer, and [batch, length] int32.
          cache: KVCache of this layer, when decoding. New keys take the slots from the first position of a row on;
            without branches the positions follow each other.
          extension: None in a training pass. `angles` are already those of its `ntk_alpha`.

        Returns:
          ([batch, length, hidden], the cache with the new keys and values, or None).
        """
        c = self.config

        # b batch, l length, d hidden, h heads, k head_dim. Heads before length transposes the kernel on CPUs: that is
        # negligible in a training step, and half of a decoding step.
        equation, bias_shape = ("bld,dhk->blhk", None) if cache is not None else ("bld,dhk->bhlk", (-1, 1, c.head_dim))

        def project(name, heads, axis):
            y = Projection(
                equation,
                (c.hidden_size, heads, c.head_dim),
                ("embed", axis, "head_dim"),
                c.init_std,
                c.compute_dtype,
                (axis, "head_dim") if c.qkv_bias else None,
                bias_shape,
                c.lora,
                deterministic,
                name=name,
            )(x)
            return y if cache is None else y.swapaxes(1, 2)

        query = rotate(project("query", c.num_heads, "heads"), *angles)
        key = rotate(project("key", c.num_kv_heads, "kv_heads"), *angles)
        value = project("value", c.num_kv_heads, "kv_heads")
        if extension is not None and extension.query_scale is not None:
            query = (query * extension.query_scale[:, None, :, None]).astype(query.dtype)
        query = constrain(query, "batch", "heads", "length", None)
        key, value = (constrain(t, "batch", "kv_heads", "length", None) for t in (key, value))
        if cache is not None:
            cache = cache.write(positions[:, 0], key, value)
        windows = None if extension is None else extension.windows
        if self.is_initializing():
            mixed = query  # parameters are made from shapes alone; attention has none of its own
        elif mask is None:
            dropping = c.attention_dropout > 0 and not deterministic
            mixed = causal_attention(
                query, key, value, segment_ids, c, dropout_rng=self.make_rng("dropout") if dropping else None
            )
        else:
            mixed = _masked_attention(
                query, key, value, mask, cache, positions, None if windows is None else windows[layer]
            )
        mixed = constrain(mixed, "batch", "heads", "length", None)
        out = Projection(
            "bhlk,hkd->bld",
            (c.num_heads, c.head_dim, c.hidden_size),
            ("heads", "head_dim", "embed"),
            c.output_init_std,
            c.compute_dtype,
            lora=c.lora,
            deterministic=deterministic,
            name="output",
        )(mixed)
        return out, cache


def _masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | Branches,
    cache: KVCache | None,
    positions: jax.Array,
    window: jax.Array | None,
) -> jax.Array:
    """[batch, heads, length, head_dim]: attention to the keys of the cache, or to `key` without one.

    Args:
      query, key, value: [batch, heads or KV heads, length, head_dim].
      mask, cache, positions: as in `SelfAttention`; the cache has the keys and values already.
      window: int32 scalar, how far back a token attends; None: to all before it.
    """
    if isinstance(mask, Branches):
        assert cache is not None  # texts go on from it
        return branch_attention(query, cache, mask, positions, window)
    if window is not None:
        key_positions = positions if cache is None else jnp.arange(cache.slots)[None]
        mask = mask & (positions[:, :, None] - key_positions[:, None, :] < window)
    if cache is not None:
        key, value = cache.key, cache.value
    return dot_product_attention(query, key, value, mask)
