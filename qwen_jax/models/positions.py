"""Rotary positions (report 2.3.1; Su et al. 2021), and context extension at inference (2.3.2)."""

import math

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.ops import matmul_precision
from qwen_jax.sharding import platform


@flax.struct.dataclass
class ContextExtension:
    """Changes of attention in an inference pass (report 2.3.2); a training pass has none.

    Attributes:
      ntk_alpha: float32 [batch], see `dynamic_ntk_alpha`; None: rotary frequencies as in training.
      query_scale: float32 [batch, length], see `logn_scale`; None: queries as in training.
      windows: int32 [layers], number of positions, its own included, that a query of each block sees; None: all.
    """

    ntk_alpha: jax.Array | None
    query_scale: jax.Array | None
    windows: jax.Array | None

    @classmethod
    def of(cls, config: ModelConfig, positions: jax.Array, ntk_alpha: jax.Array) -> "ContextExtension":
        """The extension that `config` switches on, for queries at `positions` [batch, length], 0-based."""
        windows = None
        if config.window_sizes is not None:
            all_positions = jnp.iinfo(jnp.int32).max
            windows = jnp.asarray([size or all_positions for size in config.window_sizes], jnp.int32)
        return cls(
            ntk_alpha=ntk_alpha if config.use_dynamic_ntk else None,
            query_scale=logn_scale(positions, config.context_length) if config.use_logn else None,
            windows=windows,
        )


def dynamic_ntk_alpha(lengths: jax.Array, context_length: int) -> jax.Array:
    """Factor by which NTK-aware interpolation stretches the rotary base: 1, 3, 7, 15, … as the length doubles.

    max(2^ceil(log2(length / context_length) + 1) - 1, 1), as the released code computes it at prefill.

    Args:
      lengths: int32 [...], prompt lengths without padding.
      context_length: training length.

    Returns:
      float32 [...], to be given to `rotary_angles`; 1 up to the training length.
    """
    # In integers: a rounded logarithm would jump at a power of two.
    chunks = (jnp.maximum(lengths, 1).astype(jnp.int32) + (context_length - 1)) // context_length
    doublings = 32 - jax.lax.clz(chunks - 1)
    return (jnp.left_shift(2, doublings) - 1).astype(jnp.float32)


def logn_scale(positions: jax.Array, context_length: int) -> jax.Array:
    """LogN scaling of queries: log(p) / log(context_length) at 1-based position p past the training length, 1 before.

    The released code scales only if there are more keys than that. A query past the training length always has them, in
    decoding too, so that test is not needed here.

    Args:
      positions: int32 [batch, length], 0-based.
      context_length: training length, at least 2.

    Returns:
      float32 [batch, length].
    """
    ordinal = positions.astype(jnp.float32) + 1
    return jnp.where(ordinal > context_length, jnp.log(ordinal) / math.log(context_length), 1.0)


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, ntk_alpha: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times inverse frequency, everything in float32.

    Args:
      positions: [batch, length] int32, 0-based.
      head_dim: even width of a head.
      theta: base of the frequencies.
      ntk_alpha: float32 [batch]; the base of a row becomes theta * alpha^(head_dim / (head_dim - 2)), which leaves the
        highest frequency as it is and divides the lowest by alpha.

    Returns:
      (cos, sin), each float32 [batch, length, head_dim / 2].
    """
    base: float | jax.Array = theta
    if ntk_alpha is not None:
        # A head of one pair has the frequency 1 alone, for any base.
        base = theta * ntk_alpha[:, None, None] ** (head_dim / max(head_dim - 2, 1))
    frequencies = 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim/2) of each head: half-split rotation. No gradient goes to the angles.

    Args:
      x: [batch, heads, length, head_dim].
      cos, sin: float32 [batch, length, head_dim / 2].

    Returns:
      Rotated in float32, cast back to the dtype of `x`.
    """
    cos, sin = cos[:, None], sin[:, None]
    if platform() == "tpu":
        # Halves of a head fill half of the vector unit's lanes each, and to join them costs more than a product with a
        # permutation on the matrix unit, which is exact. b batch, h heads, l length, d and e head_dim.
        turned = jnp.einsum(
            "bhld,de->bhle",
            x,
            _quarter_turn(x.shape[-1], x.dtype),
            precision=matmul_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        cos, sin = (jnp.concatenate([part, part], axis=-1) for part in (cos, sin))
        return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _quarter_turn(head_dim: int, dtype) -> jax.Array:
    """[head_dim, head_dim] that takes the pair (a, b) to (-b, a)."""
    half = jnp.eye(head_dim // 2, dtype=dtype)
    zero = jnp.zeros_like(half)
    return jnp.block([[zero, half], [-half, zero]])


def _rotate_forward(x, cos, sin):
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(angles, gradient):
    cos, sin = angles
    return rotate(gradient, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)
