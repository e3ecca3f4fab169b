"""Causal self-attention: the projections around the kernel, rotary positions, and the key-value cache."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.kernels import causal_attention, dot_product_attention
from qwen_jax.models.layers import Projection
from qwen_jax.models.positions import ContextExtension, dynamic_ntk_alpha, rotate
from qwen_jax.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of all layers; slot j of a row holds position j of that row.

    key, value: [layers, batch, kv_heads, slots, head_dim] in the compute dtype.
    ntk_alpha: float32 [batch], the stretch of the rotary base that each row's prompt asked for. Its keys are rotated
      with it, so decoding keeps it.
    """

    key: jax.Array
    value: jax.Array
    ntk_alpha: jax.Array

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, prompt_lengths: jax.Array | None = None
    ) -> "KVCache":
        """A cache of zeros for `batch` rows of at most `slots` positions.

        Args:
          prompt_lengths: int32 [batch], without padding; only a model with dynamic NTK needs them.

        Raises:
          ValueError: the model needs them, and there are none.
        """
        if config.use_dynamic_ntk and prompt_lengths is None:
            raise ValueError("dynamic NTK depends on the prompt: give KVCache.empty the rows' prompt_lengths")
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        return cls(
            key=jnp.zeros(shape, config.compute_dtype),
            value=jnp.zeros(shape, config.compute_dtype),
            ntk_alpha=dynamic_ntk_alpha(prompt_lengths, config.max_length)
            if config.use_dynamic_ntk else jnp.ones(batch, jnp.float32),
        )

    def write(self, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array) -> "KVCache":
        """Puts key and value [batch, kv_heads, length, head_dim] at `positions` [batch, length] of a layer."""
        rows = jnp.arange(positions.shape[0])[:, None]

        def put(cache, new):
            return cache.at[layer, rows, :, positions].set(new.swapaxes(1, 2))

        return self.replace(key=put(self.key, key), value=put(self.value, value))

    @property
    def slots(self) -> int:
        """How many positions of a row it holds."""
        return self.key.shape[3]


class SelfAttention(nn.Module):
    """Multi-head (or grouped-query) causal attention with rotary positions and biases on Q, K and V."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x, angles, segment_ids, mask, *, deterministic, layer=None, cache=None, positions=None,
        extension: ContextExtension | None = None,
    ):
        """Attends within `x`, or, given a cache, to all that the cache holds up to each position.

        Without a mask it is a training pass, and the configuration's kernel runs.

        Args:
          x: [batch, length, hidden].
          angles: (cos, sin) of the positions, each [batch, length, head_dim / 2].
          segment_ids: int32 [batch, length] or None, in a training pass.
          mask: bool [1 or batch, length, keys], keys being `length`, or the slots of the cache; None: a training pass.
          layer, positions: index of this layer, and [batch, length] int32.
          cache: KVCache, when decoding.
          extension: None in a training pass. `angles` are already those of its `ntk_alpha`.

        Returns:
          ([batch, length, hidden], the cache with the new keys and values, or None).
        """
        c = self.config

        def project(name, heads, axis):
            return Projection(
                "bld,dhk->bhlk", (c.hidden_size, heads, c.head_dim), ("embed", axis, "head_dim"), c.init_std,
                c.compute_dtype, (axis, "head_dim") if c.qkv_bias else None, (heads, 1, c.head_dim),
                name=name,
            )(x)

        query = rotate(project("query", c.num_heads, "heads"), *angles)
        key = rotate(project("key", c.num_kv_heads, "kv_heads"), *angles)
        value = project("value", c.num_kv_heads, "kv_heads")
        if extension is not None and extension.query_scale is not None:
            query = (query * extension.query_scale[:, None, :, None]).astype(query.dtype)
        query = constrain(query, "batch", "heads", "length", None)
        key, value = (constrain(t, "batch", "kv_heads", "length", None) for t in (key, value))
        if cache is not None:
            cache = cache.write(layer, positions, key, value)
            key, value = cache.key[layer], cache.value[layer]
        if extension is not None and extension.windows is not None:
            key_positions = positions if cache is None else jnp.arange(cache.slots)[None]
            mask = mask & (positions[:, :, None] - key_positions[:, None, :] < extension.windows[layer])
        if mask is None:
            dropping = c.attention_dropout > 0 and not deterministic
            mixed = causal_attention(
                query, key, value, segment_ids, c, dropout_rng=self.make_rng("dropout") if dropping else None
            )
        else:
            mixed = dot_product_attention(query, key, value, mask)
        mixed = constrain(mixed, "batch", "heads", "length", None)
        out = Projection(
            "bhlk,hkd->bld", (c.num_heads, c.head_dim, c.hidden_size), ("heads", "head_dim", "embed"),
            c.output_init_std, c.compute_dtype, name="output",
        )(mixed)
        return out, cache
