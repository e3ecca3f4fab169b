"""Causal self-attention: the one interface to the kernels, the projections around it, and the key-value cache."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.layers import Projection, matmul_precision
from qwen_jax.models.positions import rotate
from qwen_jax.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of all layers; slot j of a row holds position j of that row.

    key, value: [layers, batch, slots, kv_heads, head_dim] in the compute dtype.
    """

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "KVCache":
        """A cache of zeros for `batch` rows of at most `slots` positions."""
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))

    def write(self, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array) -> "KVCache":
        """Puts key and value [batch, length, kv_heads, head_dim] at `positions` [batch, length] of a layer."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.key.at[layer, rows, positions].set(key), self.value.at[layer, rows, positions].set(value)
        )


def dot_product_attention(query, key, value, mask, *, dropout_rate=0.0, dropout_rng=None) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value, with the softmax in float32.

    Args:
      query: [batch, length, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; query head h reads kv head h // (heads / kv_heads).
      mask: bool, broadcastable to [batch, length, keys]; False is not attended to.
      dropout_rate, dropout_rng: dropout on the attention weights when an rng is given.

    Returns:
      [batch, length, heads, head_dim] in the dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    precision = matmul_precision(query.dtype)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum(
        "blkgd,bmkd->bkglm", grouped, key, precision=precision, preferred_element_type=jnp.float32
    ) * (head_dim**-0.5)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if dropout_rng is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    mixed = jnp.einsum("bkglm,bmkd->blkgd", weights.astype(query.dtype), value, precision=precision)
    return mixed.reshape(batch, length, heads, head_dim)


def causal_mask(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Bool [1 or batch, length, length]: query may see key at or before it, within its segment if there are any."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


class SelfAttention(nn.Module):
    """Multi-head (or grouped-query) causal attention with rotary positions and biases on Q, K and V."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, angles, mask, *, deterministic, layer=None, cache=None, positions=None):
        """Attends within `x`, or, given a cache, to all that the cache holds up to each position.

        Args:
          x: [batch, length, hidden].
          angles: (cos, sin) of the positions, each [batch, length, head_dim / 2].
          mask: bool [1 or batch, length, keys], keys being `length`, or the slots of the cache.
          layer, cache, positions: index of this layer, KVCache and [batch, length] int32, when decoding.

        Returns:
          ([batch, length, hidden], the cache with the new keys and values, or None).
        """
        c = self.config

        def project(name, heads, axis):
            return Projection(
                "bld,dhk->blhk", (c.hidden_size, heads, c.head_dim), ("embed", axis, "head_dim"), c.init_std,
                c.compute_dtype, (axis, "head_dim") if c.qkv_bias else None, name=name,
            )(x)

        query = rotate(project("query", c.num_heads, "heads"), *angles)
        key = rotate(project("key", c.num_kv_heads, "kv_heads"), *angles)
        value = project("value", c.num_kv_heads, "kv_heads")
        query = constrain(query, "batch", "length", "heads", None)
        key, value = (constrain(t, "batch", "length", "kv_heads", None) for t in (key, value))
        if cache is not None:
            cache = cache.write(layer, positions, key, value)
            key, value = cache.key[layer], cache.value[layer]
        dropping = c.attention_dropout > 0 and not deterministic
        mixed = dot_product_attention(
            query, key, value, mask, dropout_rate=c.attention_dropout,
            dropout_rng=self.make_rng("dropout") if dropping else None,
        )
        mixed = constrain(mixed, "batch", "length", "heads", None)
        out = Projection(
            "blhk,hkd->bld", (c.num_heads, c.head_dim, c.hidden_size), ("heads", "head_dim", "embed"),
            c.output_init_std, c.compute_dtype, name="output",
        )(mixed)
        return out, cache
