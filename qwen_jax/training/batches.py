"""Batches of a run: sharded arrays out of examples by global index, read ahead of the devices."""

import concurrent.futures
import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from qwen_jax.checkpoints.rewind import after_skipped


class Examples(Protocol):
    """Random access to examples by global index; what `qwen_jax.data.loader` gives.

    columns: int32 columns besides "tokens" and "loss_weights", such as "segment_ids" of packed rows.
    """

    bytes_per_token: float
    fingerprint: str
    repeat: bool
    columns: tuple[str, ...]

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> dict[str, np.ndarray]: ...


def global_batch(examples: Examples, start: int, shapes: dict) -> dict[str, jax.Array]:
    """The batch of examples `start`, `start + 1`, … as sharded arrays; each host reads only its own rows.

    Rows past the end of `examples` (only where they do not repeat) are zeros, and carry no loss.
    """
    rows = next(iter(shapes.values())).shape[0]
    stop = start + rows if examples.repeat else min(start + rows, len(examples))
    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name, index):
        first, last, _ = index[0].indices(rows)
        if (first, last) not in read:
            read[first, last] = examples.read(start + first, min(start + last, stop)) if start + first < stop else {}
        values = read[first, last].get(name)
        shape = (last - first, shapes[name].shape[1])
        if values is None or values.shape != shape:
            padded = np.zeros(shape, shapes[name].dtype)
            if values is not None:
                padded[: len(values)] = values
            values = padded
        return values[:, index[1]]

    return {
        name: jax.make_array_from_callback(shape.shape, shape.sharding, lambda index, name=name: part(name, index))
        for name, shape in shapes.items()
    }


class Prefetcher:
    """Reads the next batches in a thread while the devices compute.

    Attributes:
      position: index of the first example that `next` has not yet given, which is where a resumed run begins.
      waited: seconds that `next` was waited for.
    """

    def __init__(
        self, examples: Examples, shapes: dict, position: int, skipped: Sequence[tuple[int, int]] = (), depth: int = 2
    ):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._examples, self._shapes, self._skipped = examples, shapes, skipped
        self._rows = next(iter(shapes.values())).shape[0]
        self._requested = position
        self._queue = [self._request() for _ in range(depth)]
        self.position, self.waited = position, 0.0

    def _request(self):
        start = after_skipped(self._requested, self._skipped)
        self._requested = start + self._rows
        return self._requested, self._pool.submit(global_batch, self._examples, start, self._shapes)

    def next(self) -> dict[str, jax.Array]:
        """The next batch of the data order."""
        began = time.perf_counter()
        position, batch = self._queue.pop(0)
        batch = batch.result()
        self.position = position
        self.waited += time.perf_counter() - began
        self._queue.append(self._request())
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
