"""Batches of a run: sharded arrays out of examples by global index, read ahead of the devices."""

import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from qwen_jax.batch_spec import Column
from qwen_jax.checkpoints.rewind import after_skipped


class Examples(Protocol):
    """Random access to examples by global index, as `qwen_jax.data.loader` gives it.

    An objective may require more: that of text requires `bytes_per_token`.

    Attributes:
      fingerprint: of data and order; a run is not resumed where it differs.
      repeat: whether indices continue without end, or end at `len`.
      columns: the columns of the arrays that `read` gives.
    """

    fingerprint: str
    repeat: bool
    columns: tuple[Column, ...]

    def __len__(self) -> int:
        """Examples of one epoch."""

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Examples [start, stop): for each column an array [stop - start, *shape of a row]."""


def global_batch(examples: Examples, start: int, shapes: dict) -> dict[str, jax.Array]:
    """The batch of examples `start`, `start + 1`, … as sharded arrays; each host reads only its own rows.

    Rows past the end of `examples` (only where they do not repeat) are zeros: an objective must give them no weight.
    """
    rows = next(iter(shapes.values())).shape[0]
    stop = start + rows if examples.repeat else min(start + rows, len(examples))
    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name, index):
        first, last, _ = index[0].indices(rows)
        if (first, last) not in read:
            read[first, last] = examples.read(start + first, min(start + last, stop)) if start + first < stop else {}
        values = read[first, last].get(name)
        shape = (last - first, *shapes[name].shape[1:])
        if values is None or values.shape != shape:
            padded = np.zeros(shape, shapes[name].dtype)
            if values is not None:
                padded[: len(values)] = values
            values = padded
        return values[:, *index[1:]]

    return {
        name: jax.make_array_from_callback(shape.shape, shape.sharding, lambda index, name=name: part(name, index))
        for name, shape in shapes.items()
    }


class Batches(Protocol):
    """Source of the batches of a `Trainer`: a `Prefetcher`, or a producer that generates them.

    Attributes:
      columns: of every batch.
      shapes: name of each column to the ShapeDtypeStruct of its array, placed on the mesh.
      fingerprints: name of each data stream to the fingerprint of its data and order.
      positions: name of each data stream to the index at which a resumed run begins, after the batches so far.
      waited: seconds that callers of `next` have waited.
    """

    columns: tuple[Column, ...]
    shapes: dict[str, jax.ShapeDtypeStruct]
    fingerprints: dict[str, str]
    positions: dict[str, int]
    waited: float

    def start(self, positions: Mapping[str, int]) -> None:
        """Begins at these positions; streams that are not named begin at 0."""

    def next(self) -> dict[str, jax.Array]:
        """The next batch."""

    def close(self) -> None:
        """Releases threads and files; also where `start` was not called."""


class Prefetcher:
    """Reads the next batches of one data stream in a thread while the devices compute. A kind of `Batches`."""

    def __init__(
        self,
        examples: Examples,
        shapes: dict[str, jax.ShapeDtypeStruct],
        skipped: Sequence[tuple[int, int]] = (),
        *,
        stream: str = "train",
        depth: int = 2,
    ):
        """Reads nothing yet.

        Args:
          shapes: of a batch, as `step.batch_shapes` gives.
          skipped: spans [start, stop) of the order that are passed over.
          stream: name of the position in checkpoints.
          depth: batches that are read ahead.
        """
        self._examples, self.shapes, self.columns = examples, shapes, examples.columns
        self._skipped, self._stream, self._depth = skipped, stream, depth
        self._rows = next(iter(shapes.values())).shape[0]
        self.fingerprints, self.positions, self.waited = {stream: examples.fingerprint}, {stream: 0}, 0.0
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def start(self, positions: Mapping[str, int]) -> None:
        """Begins to read at the position of the stream, 0 by default."""
        self._requested = positions.get(self._stream, 0)
        self.positions = {self._stream: self._requested}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._queue = [self._request() for _ in range(self._depth)]

    def _request(self):
        assert self._pool is not None  # `start` has made it
        start = after_skipped(self._requested, self._skipped)
        self._requested = start + self._rows
        return self._requested, self._pool.submit(global_batch, self._examples, start, self.shapes)

    def next(self) -> dict[str, jax.Array]:
        """The next batch of the data order."""
        began = time.perf_counter()
        position, batch = self._queue.pop(0)
        batch = batch.result()
        self.positions = {self._stream: position}
        self.waited += time.perf_counter() - began
        self._queue.append(self._request())
        return batch

    def close(self) -> None:
        """Ends the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
