"""The position-aware adapter of Qwen-VL: one cross-attention from learned queries to the patches of a picture."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.kernels import dot_product_attention
from qwen_jax.models.layers import LayerNorm, Projection, named_init, weight_init
from qwen_jax.models.vision.config import RESAMPLER_HEAD_DIM, VisionConfig
from qwen_jax.models.vision.positions import resize_positions, sine_positions
from qwen_jax.sharding import constrain

# Longest wavelength over 2 pi, in cells, of the sines of `VisionConfig.place_start`.
_SHORT = 2.0


class Resampler(nn.Module):
    """Turns any number of patches into `num_queries` features.

    Fixed sines and cosines of the grid are added to queries and keys, not to values. They are a parameter, `positions`,
    since checkpoints hold them and the released fine-tuning changes them; recipes freeze it.
    Letters: b batch, q queries, l patches, w encoder width, d hidden, h heads, k head_dim.
    """

    config: ModelConfig
    vision: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, patches, width] to [batch, num_queries, hidden], the patches being a square grid."""
        c, dtype, std = self.vision, self.config.compute_dtype, self.config.init_std
        width, heads = self.config.hidden_size, self.config.hidden_size // RESAMPLER_HEAD_DIM
        projection = functools.partial(Projection, std=std, dtype=dtype)
        norm = functools.partial(LayerNorm, c.norm_epsilon, dtype)
        queries = self.param("queries", weight_init(std, (None, "embed")), (c.num_queries, width))
        fixed = functools.partial(_sine_initializer, grid=c.query_grid, place_start=c.place_start)
        positions = self.param("positions", named_init(fixed, (None, "embed")), (c.num_queries, width))

        values = projection("blw,wd->bld", (c.width, width), (None, "embed"), name="input")(x)
        values = norm(name="input_norm")(values)
        grid = round(x.shape[1] ** 0.5)
        keys = values + resize_positions(positions, grid).astype(dtype)
        asked = norm(name="query_norm")(queries.astype(dtype)) + positions.astype(dtype)

        def heads_of(name, given, kernel_init=None):
            return projection(
                "bld,dhk->bhlk",
                (width, heads, RESAMPLER_HEAD_DIM),
                ("embed", "heads", "head_dim"),
                bias_names=("heads", "head_dim"),
                bias_shape=(heads, 1, RESAMPLER_HEAD_DIM),
                kernel_init=kernel_init,
                name=name,
            )(given)

        # Equal queries and keys of equal places match.
        same = _identity if c.place_start else None

        # The queries are the same for all pictures: their projection is computed once.
        query = heads_of("query", asked[None], same)
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape[1:]))
        parts = (query, heads_of("key", keys, same), heads_of("value", values))
        query, key, value = (constrain(part, "batch", "heads", None, None) for part in parts)
        mixed = dot_product_attention(query, key, value, None)
        return projection(
            "bhqk,hkd->bqd",
            (heads, RESAMPLER_HEAD_DIM, width),
            ("heads", "head_dim", "embed"),
            bias_names=("norm",),
            name="attention_output",
        )(mixed)


def _sine_initializer(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32, *, grid: int, place_start: float):
    if place_start:
        return jnp.asarray(place_start * sine_positions(grid, shape[1], _SHORT), dtype)
    return jnp.asarray(sine_positions(grid, shape[1]), dtype)


def _identity(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    return jnp.eye(shape[0], dtype=dtype).reshape(shape)
