"""Uploads that run beside the work: what a piece has written goes to its bucket while the next piece is made."""

import collections
import concurrent.futures
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

# Uploads under way or waiting, at most: of pieces, and of bytes, which lie in the folder of temporary files.
_PIECES, _BYTES = 16, 1 << 28
_THREADS = 8
_waiting: contextvars.ContextVar["_Written | None"] = contextvars.ContextVar("_waiting", default=None)
_abandoned = threading.Event()


class _Written:
    """What a piece has written so far and nobody has uploaded."""

    def __init__(self):
        self.uploads: list[tuple[Callable[[], object], contextlib.ExitStack]] = []
        self.bytes = 0

    def upload(self) -> None:
        """Uploads in the order of writing; removes the files, also after an error."""
        uploads, self.uploads, self.bytes = self.uploads, [], 0
        with contextlib.ExitStack() as stack:
            for _, scratch in uploads:
                stack.enter_context(scratch)
            for upload, scratch in uploads:
                upload()
                scratch.close()

    def discard(self) -> None:
        """Removes the files."""
        for _, scratch in self.uploads:
            scratch.close()


def do(upload: Callable[[], object], size: int, scratch: contextlib.ExitStack | None = None) -> None:
    """Calls `upload` and closes `scratch`: here and now, or after the piece of an `UploadsBehind`.

    Args:
      size: of what is uploaded, in bytes. A piece that has written much uploads it at once.
    """
    written = _waiting.get() or _Written()
    written.uploads.append((upload, scratch or contextlib.ExitStack()))
    written.bytes += size
    if _waiting.get() is None or written.bytes > _BYTES:
        written.upload()


def were_abandoned() -> bool:
    """Whether Ctrl-C came while uploads were waited for, so that threads may still be at them."""
    return _abandoned.is_set()


class UploadsBehind:
    """Calls pieces of work, one after the other, and uploads what each wrote into buckets while the next one works.

    A piece must not read what it has written. Its objects appear in the order in which they were written, those of
    several pieces in any order. Of a piece that fails nothing is uploaded, unless it had written more than 256 MiB. As
    a context, `wait` ends the block.
    """

    def __init__(self):
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()

    def __call__(self, function: Callable[..., object], *piece) -> None:
        """Calls `function(*piece)`, and begins its uploads.

        Raises:
          OSError: an earlier upload failed; see `objects.call`. And what `function` raises.
        """
        written = _Written()
        token = _waiting.set(written)
        try:
            function(*piece)
        except BaseException:
            written.discard()
            raise
        finally:
            _waiting.reset(token)
        if written.uploads:
            self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(_THREADS, "uploads")
            size = written.bytes
            self._running.append((self._pool.submit(written.upload), size))
        self._check(_PIECES - 1, _BYTES)

    @property
    def waiting(self) -> bool:
        """Whether uploads may be unfinished."""
        return bool(self._running)

    def _check(self, pieces: int, size: int) -> None:
        """Waits until at most so many pieces, and bytes of several, are being uploaded; raises the error of one."""
        while self._running and (
            len(self._running) > pieces
            or (len(self._running) > 1 and sum(one for _, one in self._running) > size)
            or self._running[0][0].done()
        ):
            self._running.popleft()[0].result()

    def wait(self) -> None:
        """Returns when all is uploaded.

        Raises:
          OSError: an upload failed; all others are finished.
        """
        self.settle()
        self._check(0, 0)

    def settle(self) -> None:
        """Returns when no upload is running, whatever became of them."""
        concurrent.futures.wait([future for future, _ in self._running])

    def __enter__(self) -> "UploadsBehind":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.waiting:
            log.warning("uploading what is finished: Ctrl-C again leaves it")
        try:
            self.wait() if kind is None else self.settle()
        except KeyboardInterrupt:
            _abandoned.set()
            raise
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=not _abandoned.is_set(), cancel_futures=True)
