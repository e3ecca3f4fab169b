"""Work on a row of large arrays in stages that overlap: one reads the next array while another writes the last one."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np

from qwen_jax.conversion.mapping import ExternalTensor, Weights, assemble, read_parts

# Bytes of arrays that wait between two stages: one large matrix of a 7B model, or many small ones.
WAITING_BYTES = 2**27


def staged(
    items: Iterable, stages: Sequence[Callable], size: Callable[[Any], int], limit: int = WAITING_BYTES
) -> Generator[Any]:
    """Yields `stages[-1](… stages[0](item))` of each item, in order.

    One thread takes the items, and one runs each stage. numpy, TensorStore and file systems release Python's lock, so
    they run on different cores. No thread keeps an array that it has handed on. Close the generator when it is not
    read to its end.

    Args:
      size: bytes of the arrays in an item, and in the result of a stage.
      limit: bytes of arrays that wait after each thread, with one array beyond.

    Raises:
      Exception: that of the items or of a stage, in the place of the item that it failed for.
    """
    belts = [_Belt(size, limit) for _ in range(len(stages) + 1)]
    filled = [iter(items)]
    filled += [map(stage, belt.taken()) for stage, belt in zip(stages, belts, strict=False)]
    threads = [
        threading.Thread(target=belt.fill, args=(source,), daemon=True)
        for belt, source in zip(belts, filled, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield from belts[-1].taken()
    finally:
        for belt in belts:
            belt.stop()
        for thread in threads:
            thread.join()


@dataclasses.dataclass(frozen=True)
class _End:
    """After the last item: the error that ended a stage, or None."""

    error: BaseException | None = None


class _Stopped(Exception):
    """Nobody takes the items any more."""


class _Belt:
    """What one stage has made and the next one has not taken yet."""

    def __init__(self, size: Callable[[Any], int], limit: int):
        self._size, self._limit = size, limit
        self._waiting: collections.deque[tuple[Any, int]] = collections.deque()
        self._bytes, self._stopped, self._changed = 0, False, threading.Condition()

    def fill(self, source: Iterable) -> None:
        """Puts each item of the source; waits while there is no room."""
        try:
            for item in source:
                self._put(item, self._size(item))
                del item  # it is the next one's to free
                self._wait_for(lambda: self._bytes <= self._limit)
            self._put(_End(), 0)
        except _Stopped:
            return
        except BaseException as error:  # whatever it is: the consumer raises it
            self._put(_End(error), 0)

    def taken(self) -> Generator[Any]:
        """The items in order, then the error of the stage that made them, if there was one."""
        while True:
            self._wait_for(lambda: len(self._waiting) > 0)
            if isinstance(self._waiting[0][0], _End):
                break
            yield self._take()  # not by a variable, which would keep the item
        if (error := self._take().error) is not None:
            raise error

    def _put(self, item: Any, count: int) -> None:
        with self._changed:
            self._waiting.append((item, count))
            self._bytes += count
            self._changed.notify_all()

    def _take(self) -> Any:
        with self._changed:
            item, count = self._waiting.popleft()
            self._bytes -= count
            self._changed.notify_all()
            return item

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._stopped)
            if self._stopped:
                raise _Stopped

    def stop(self) -> None:
        """Frees the items and ends both sides."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()


def assembled(weights: Weights, wanted: Iterable[tuple[ExternalTensor, Any]]) -> Generator[np.ndarray]:
    """Each tensor of (tensor, dtype) made of our parameters, contiguous; reads the next while one is made or written.

    Close it when it is not read to its end.
    """
    parts = ((tensor, dtype, read_parts(weights, tensor, dtype)) for tensor, dtype in wanted)

    def make(read):
        tensor, dtype, parts = read
        return assemble(tensor, parts, dtype)

    return staged(parts, (make,), _bytes)


def _bytes(made: np.ndarray | tuple) -> int:
    return made.nbytes if isinstance(made, np.ndarray) else sum(part.nbytes for part in made[-1])
