"""Rotary position embedding (report 2.3.1; Su et al. 2021): half-split rotation, everything in float32."""

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times inverse frequency.

    Args:
      positions: [batch, length] int32, 0-based.
      head_dim: even width of a head.
      theta: base of the frequencies.

    Returns:
      (cos, sin), each float32 [batch, length, head_dim / 2].
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim/2) of each head.

    Args:
      x: [batch, length, heads, head_dim].
      cos, sin: float32 [batch, length, head_dim / 2].

    Returns:
      Rotated in float32, cast back to the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
