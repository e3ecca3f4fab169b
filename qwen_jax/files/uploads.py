"""Uploads that run beside the work: what a piece has written goes to its bucket while the next piece is made."""

import collections
import concurrent.futures
import contextlib
import contextvars
from collections.abc import Callable

# Pieces of which nothing but the upload is left, at most: their files lie in the folder of temporary files.
_PIECES = 16
_Upload = tuple[Callable[[], object], contextlib.ExitStack]
_written: contextvars.ContextVar[list[_Upload] | None] = contextvars.ContextVar("_written", default=None)


def do(upload: Callable[[], object], scratch: contextlib.ExitStack | None = None) -> None:
    """Calls `upload` and closes `scratch`: here and now, or after the piece of an `UploadsBehind`."""
    scratch = scratch or contextlib.ExitStack()
    waiting = _written.get()
    if waiting is not None:
        waiting.append((upload, scratch))
        return
    with scratch:
        upload()


class UploadsBehind:
    """Calls pieces of work, one after the other, and uploads what each wrote into buckets while the next one works.

    A piece must not read what it has written. Its objects appear in the order in which they were written, those of
    several pieces in any order. Nothing of a piece that fails is uploaded. As a context, `wait` ends the block.
    """

    def __init__(self):
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: collections.deque[concurrent.futures.Future] = collections.deque()

    def __call__(self, function: Callable[..., object], *piece) -> None:
        """Calls `function(*piece)`, and begins its uploads.

        Raises:
          OSError: an earlier upload failed; see `objects.call`. And what `function` raises.
        """
        written: list[_Upload] = []
        token = _written.set(written)
        try:
            function(*piece)
        except BaseException:
            for _, scratch in written:
                scratch.close()
            raise
        finally:
            _written.reset(token)
        if written:
            self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(_PIECES, "uploads")
            self._running.append(self._pool.submit(_upload_all, written))
        self._check(_PIECES - 1)

    @property
    def waiting(self) -> bool:
        """Whether uploads may be unfinished."""
        return bool(self._running)

    def _check(self, most: int) -> None:
        """Waits until at most so many pieces are being uploaded; raises the error of one."""
        while self._running and (len(self._running) > most or self._running[0].done()):
            self._running.popleft().result()

    def wait(self) -> None:
        """Returns when all is uploaded.

        Raises:
          OSError: an upload failed; all others are finished.
        """
        self.settle()
        self._check(0)

    def settle(self) -> None:
        """Returns when no upload is running, whatever became of them."""
        concurrent.futures.wait(self._running)

    def __enter__(self) -> "UploadsBehind":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.settle() if kind else self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()


def _upload_all(written: list[_Upload]) -> None:
    with contextlib.ExitStack() as stack:
        for _, scratch in written:
            stack.enter_context(scratch)
        for upload, _ in written:
            upload()
