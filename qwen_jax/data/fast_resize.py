"""Pillow's bicubic resize to the last bit, compiled by Numba (extra `images`): three times as fast on one core.

Pillow resizes in two passes, first along rows and then along columns, with weights in 22 bits after the point, and
rounds and clips to 8 bits after each (its `Resample.c`). The same sums over contiguous memory become vector
instructions. Pillow 13 begins with the columns where the height shrinks more: `agrees` finds out whether the installed
release is one that this equals, and image workers fall back on Pillow where it is not.
"""

import functools
import math

import numba  # of the extra `images`
import numpy as np
from PIL import Image

_BITS = 22  # 32, less 8 of a level and 2 against overflow
_TALL = 100  # height over width
_ROWS = 32  # at a time: of large pictures, they stay in the cache of the processor while they are turned
_SUPPORT = 2.0  # pixels of the source to each side, of a picture that is not made smaller


@functools.lru_cache(maxsize=256)
def weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the pixels of a row of `source` pixels in each of `target` pixels.

    Returns:
        (first pixel, number of pixels, weights), int64 [target], int64 [target] and int32 [target, most pixels].
    """
    scale = source / target
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    first, count = np.empty(target, np.int64), np.empty(target, np.int64)
    found = np.zeros((target, math.ceil(support) * 2 + 1), np.int32)
    for pixel in range(target):
        center = (pixel + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source)
        values = [_cubic((place - center + 0.5) * (1.0 / stretch)) for place in range(low, high)]
        total = sum(values)
        fixed = [value / total * (1 << _BITS) for value in values]
        first[pixel], count[pixel] = low, high - low
        found[pixel, : high - low] = [int(value - 0.5) if value < 0 else int(value + 0.5) for value in fixed]
    return first, count, found


def _cubic(x: float) -> float:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@numba.njit(cache=True)
def _weighted(source, first, count, found, target):  # pragma: no cover  compiled
    """Rows of `target` as weighted sums of rows of `source`; uint8 [.., same length]."""
    length = source.shape[1]
    sums = np.empty(length, np.int32)
    for row in range(target.shape[0]):
        for place in range(length):
            sums[place] = 1 << (_BITS - 1)
        for tap in range(count[row]):
            weight, values = found[row, tap], source[first[row] + tap]
            for place in range(length):
                sums[place] += np.int32(values[place]) * weight
        for place in range(length):
            target[row, place] = np.uint8(min(max(sums[place] >> _BITS, 0), 255))


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """A picture squashed to a square, as `Image.resize((size, size), BICUBIC)` of Pillow 11 and 12.

    Args:
        pixels: uint8 [height, width, 3].

    Returns:
        uint8 [size, size, 3].
    """
    height, width, _ = pixels.shape
    # Pillow begins with the columns of such pictures, so that the result between the passes is small.
    if height > _TALL * width and size < height:
        return _along_rows(_along_columns(pixels, size), size)
    return _along_columns(_along_rows(pixels, size), size)


def _along_rows(pixels: np.ndarray, size: int) -> np.ndarray:
    """From [height, width, 3] to [height, size, 3]."""
    height, width, channels = pixels.shape
    result = np.empty((height, size, channels), np.uint8)
    for start in range(0, height, _ROWS):
        rows = pixels[start : start + _ROWS]
        # With the width first, a pixel of the result is a sum of contiguous vectors.
        source = np.ascontiguousarray(rows.transpose(1, 2, 0)).reshape(width, -1)
        target = np.empty((size, source.shape[1]), np.uint8)
        _weighted(source, *weights(width, size), target)
        result[start : start + _ROWS] = target.reshape(size, channels, len(rows)).transpose(2, 0, 1)
    return result


def _along_columns(pixels: np.ndarray, size: int) -> np.ndarray:
    """From [height, width, 3] to [size, width, 3]."""
    height, width, channels = pixels.shape
    target = np.empty((size, width * channels), np.uint8)
    _weighted(np.ascontiguousarray(pixels).reshape(height, -1), *weights(height, size), target)
    return target.reshape(size, width, channels)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """As `images.squash`."""
    return resize(np.asarray(image), size)


def agrees() -> bool:
    """Whether `resize` equals the installed Pillow on pictures of all proportions."""
    generator = np.random.default_rng(0)
    for height, width in ((37, 211), (211, 37), (400, 3), (64, 48), (9, 7)):
        for pixels in (
            generator.integers(0, 256, (height, width, 3)),
            generator.integers(0, 2, (height, width, 3)) * 255,
        ):
            levels = pixels.astype(np.uint8)
            expected = np.asarray(Image.fromarray(levels).resize((28, 28), Image.Resampling.BICUBIC))
            if not np.array_equal(resize(levels, 28), expected):
                return False
    return True
