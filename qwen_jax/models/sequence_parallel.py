"""Balanced queries for rows that are split over the `sequence` axis: every device gets the same work.

Of N devices in a row, device d holds chunks 2d and 2d + 1 of the 2N equal chunks of each row. A causal kernel that
skips blocks above the diagonal would leave the first device almost idle and give the last one nearly twice the mean.
So the queries, and nothing else, change places during the kernel: device d computes chunks d and 2N - 1 - d,
of which every pair has the same number of keys before it.
"""

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "sequence"


def _moves(shards: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of every device's first chunk and of its second one; both are permutations of the devices."""

    def target(chunk):
        return min(chunk, 2 * shards - 1 - chunk)

    first = [(device, target(2 * device)) for device in range(shards)]
    return first, [(device, target(2 * device + 1)) for device in range(shards)]


def balanced_positions(length: int, shards: int) -> np.ndarray:
    """int32 [length]: the position of every query after `balance`, device by device."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    order = np.empty((shards, 2), int)
    for half, moves in enumerate(_moves(shards)):
        for source, target in moves:
            order[target, half] = 2 * source + half
    return chunks[order.reshape(-1)].reshape(-1)


def _exchange(x, axis: int, moves) -> jax.Array:
    halves = jnp.split(x, 2, axis)
    return jnp.concatenate([jax.lax.ppermute(half, AXIS, move) for half, move in zip(halves, moves, strict=True)], axis)


def balance(x: jax.Array, axis: int, shards: int) -> jax.Array:
    """Exchanges one device's part of a row, along `axis`, for the two chunks whose queries it computes.

    For use where AXIS is a manual mesh axis of `shards` devices.
    """
    return _exchange(x, axis, _moves(shards))


def unbalance(x: jax.Array, axis: int, shards: int) -> jax.Array:
    """The inverse of `balance`."""
    return _exchange(x, axis, [[(target, source) for source, target in move] for move in _moves(shards)])


def gather_rows(x: jax.Array, axis: int) -> jax.Array:
    """Gathers the positions along `axis` from all devices; the gradient is summed back to the parts."""
    return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)
