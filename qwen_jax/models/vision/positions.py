"""Positions on a grid: resized as torch's bicubic interpolation does, and fixed sines and cosines of two axes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Of torch (aten UpSample.h) and OpenCV. jax.image.resize has -0.5 and renormalizes at the edges.
_CUBIC = -0.75


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Float32 [new_size, size]: the weights that torch's bicubic interpolation gives to the points of one axis.

    As `interpolate(mode="bicubic", align_corners=False)`: edges are clamped, and shrinking does not smooth.
    """
    matrix = np.zeros((new_size, size))
    for row in range(new_size):
        place = (row + 0.5) * size / new_size - 0.5
        first = math.floor(place)
        for point in range(first - 1, first + 3):
            distance = abs(place - point)
            if distance <= 1:
                weight = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
            else:
                weight = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
            matrix[row, min(max(point, 0), size - 1)] += weight
    return matrix.astype(np.float32)


def resize_positions(positions: jax.Array, grid: int) -> jax.Array:
    """Positions of a square grid resized to `grid` x `grid`.

    Args:
      positions: float32 [size * size, width], row by row.

    Returns:
      Float32 [grid * grid, width].
    """
    size = math.isqrt(positions.shape[0])
    if size == grid:
        return positions
    matrix = jnp.asarray(bicubic_matrix(size, grid))
    square = positions.reshape(size, size, -1)
    # r, s rows and columns there, h, w rows and columns here, d width.
    resized = jnp.einsum("rh,sw,hwd->rsd", matrix, matrix, square, precision=jax.lax.Precision.HIGHEST)
    return resized.reshape(grid * grid, -1)


def sine_positions(grid: int, width: int, longest: float = 10_000.0) -> np.ndarray:
    """Fixed positions of a grid, float32 [grid * grid, width], row by row.

    As the released `get_2d_sincos_pos_embed`: the first half of a vector is of the column, the second of the row, and
    each half is sines, then cosines, at wavelengths from 2 pi cells up to 2 pi `longest`.
    """
    frequencies = longest ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid, dtype=np.float32)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    columns = np.broadcast_to(axis[None, :], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width).astype(np.float32)
