"""Requests that come one after the other, from any iterable."""

import contextlib
import queue
import threading
from collections.abc import Iterable
from typing import Any

END = object()


class ReadAhead:
    """An iterable that a thread reads ahead, so that the engine need not wait for the next item.

    An error of the iterable is raised in place of its next item.
    """

    def __init__(self, items: Iterable, ahead: int):
        """Reads at most `ahead` + 1 items before they are taken."""
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        threading.Thread(target=self._read, args=(items,), name="requests", daemon=True).start()

    def _read(self, items: Iterable) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
                if self._closed.is_set():
                    return
            self._queue.put((END, None))
        except BaseException as error:  # noqa: BLE001  raised again where the items are taken
            self._queue.put((END, error))

    def take(self, wait: bool) -> Any:
        """The next item, or END; None if there is none yet and `wait` is false.

        Raises:
          Exception: the error of the iterable.
        """
        try:
            item, error = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Ends the thread, as soon as the iterable gives it the next item."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get(block=False)


class ReadInStep:
    """An iterable that is read on demand: for processes that must all read the same items."""

    def __init__(self, items: Iterable):
        self._items = iter(items)

    def take(self, wait: bool) -> Any:
        """The next item, or END. Always waits."""
        return next(self._items, END)

    def close(self) -> None:
        """Reads nothing more."""
