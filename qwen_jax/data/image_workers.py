"""Pictures decoded by worker processes, ahead of the devices.

Encoded files go to a worker through a pipe, and pixels come back in memory that both share, so nothing is pickled. A
worker is `python -m qwen_jax.data.image_workers`: it imports Pillow and NumPy and nothing that trains, and it ends when
the process that started it does. A file that kills its worker is named, and another worker takes the place.
"""

import concurrent.futures
import contextlib
import mmap
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_jax.data.images import UnusableImageError, decode_into

# Pictures of a request: several, so that a worker does not wait for the next one after each.
CHUNK = 8
# Requests that a worker has at a time: it decodes one while the pixels of the other are copied.
_SIDES = 2
# Side of the shared memory, pictures, number of the first one and of all; and number and length of what failed.
_REQUEST, _ANSWER = struct.Struct("<IIII"), struct.Struct("<I")


class ImageWorkers:
    """Worker processes that decode and resize pictures.

    `decode` may be called from several threads. Workers start with the first call, and end with `close` or when nothing
    refers to this any more.
    """

    def __init__(self, size: int, num_workers: int, python: str = sys.executable):
        """Starts nothing yet.

        Args:
            size: height and width of the decoded pictures.
            num_workers: processes; one for each core that the devices leave free.
            python: interpreter of the workers. It needs NumPy, and Pillow or pillow-simd, which resizes ten times as
                fast, within 2 levels of Pillow.

        Raises:
            ValueError: there would be no worker.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}: it takes at least one process to decode")
        self._size, self._num_workers, self._python = size, num_workers, python
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)  # started when it is first needed
        self._pool = concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="images")
        self.close = weakref.finalize(self, _close, self._pool, self._idle, num_workers)

    def decode(self, images: Sequence[bytes]) -> np.ndarray:
        """As `images.decode_images`: uint8 [len(images), size, size, 3].

        Raises:
            UnusableImageError: a picture is none, is damaged, or ended its worker; the message has its number.
        """
        result = np.empty((len(images), self._size, self._size, 3), np.uint8)
        # Small batches are dealt out evenly, too.
        chunk = max(1, min(CHUNK, -(-len(images) // (_SIDES * self._num_workers))))
        starts = iter(range(0, len(images), chunk))
        lock = threading.Lock()

        def chunks():
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                yield start, images[start : start + chunk]

        count = min(self._num_workers, -(-len(images) // chunk))
        works = [self._pool.submit(self._work, chunks(), result, len(images)) for _ in range(count)]
        concurrent.futures.wait(works)
        for work in works:
            work.result()
        return result

    def _work(self, chunks, result: np.ndarray, total: int) -> None:
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self._size, self._python)
            worker.decode(chunks, result, total)
        finally:
            if worker is not None and worker.ended:
                worker.close()
                worker = None  # the next call starts another one
            self._idle.put(worker)

    def __enter__(self) -> "ImageWorkers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close(pool: concurrent.futures.ThreadPoolExecutor, idle: queue.SimpleQueue, count: int) -> None:
    """Ends the workers."""
    pool.shutdown(cancel_futures=True)
    for _ in range(count):
        worker = idle.get()
        if worker is not None:
            worker.close()


class _Worker:
    """One process, and the memory that it shares.

    Attributes:
        ended: whether the process is gone.
    """

    def __init__(self, size: int, python: str):
        self.ended = False
        shape = (_SIDES, CHUNK, size, size, 3)
        with _shared_file(int(np.prod(shape))) as file:
            self._pixels = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8).reshape(shape)
            package = Path(__file__).resolve().parents[2]
            paths = [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            self._process = subprocess.Popen(
                [python, "-m", "qwen_jax.data.image_workers", str(file.fileno()), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )

    def decode(self, chunks, result: np.ndarray, total: int) -> None:
        """Decodes chunks (first picture, files) into their places in `result`."""
        side, waiting = 0, None
        for start, files in chunks:
            self._send(side, start, files, total)
            if waiting is not None:
                self._copy(*waiting, result)
            self._receive(start, len(files), total)
            waiting = side, start, len(files)
            side = (side + 1) % _SIDES
        if waiting is not None:
            self._copy(*waiting, result)

    def _send(self, side: int, start: int, files: Sequence[bytes], total: int) -> None:
        assert self._process.stdin is not None
        try:
            header = _REQUEST.pack(side, len(files), start, total)
            self._process.stdin.write(header + struct.pack(f"<{len(files)}Q", *map(len, files)))
            for file in files:
                self._process.stdin.write(file)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended(start, len(files), total) from error

    def _receive(self, start: int, count: int, total: int) -> None:
        assert self._process.stdout is not None
        header = self._process.stdout.read(_ANSWER.size)
        if len(header) < _ANSWER.size:
            raise self._ended(start, count, total)
        (length,) = _ANSWER.unpack(header)
        if length:
            reason, _, message = self._process.stdout.read(length).decode("utf-8", "replace").partition("\n")
            raise UnusableImageError(message, reason)

    def _ended(self, start: int, count: int, total: int) -> UnusableImageError:
        self.ended = True
        status = self._process.wait()
        return UnusableImageError(
            f"one of the pictures {start} to {start + count - 1} of {total} ended the process that decoded it (exit "
            f"status {status}): leave it out, or give the machine more memory",
            "a picture that ended its process",
        )

    def _copy(self, side: int, start: int, count: int, result: np.ndarray) -> None:
        result[start : start + count] = self._pixels[side, :count]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def _shared_file(size: int):
    """A file without a name, in memory where the platform has such files and room for it."""
    for folder in ("/dev/shm", None):
        with contextlib.suppress(OSError):
            file = tempfile.TemporaryFile(dir=folder)
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and not a signal later
                return file
            except OSError:
                file.close()
    raise OSError(f"no room for {size:,} bytes of pixels in /dev/shm nor in {tempfile.gettempdir()}: set TMPDIR")


def serve(file: int, size: int) -> None:
    """The loop of a worker: reads requests from standard input, answers on standard output, ends with its input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides what an interrupt means
    pixels = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(_SIDES, CHUNK, size, size, 3)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        side, count, start, total = _REQUEST.unpack(header)
        lengths = struct.unpack(f"<{count}Q", requests.read(8 * count))
        images = [requests.read(length) for length in lengths]
        failure = b""
        for number, data in enumerate(images):
            try:
                decode_into(data, pixels[side, number], name=f"picture {start + number} of {total}")
            except UnusableImageError as error:
                failure = f"{error.reason}\n{error}".encode("utf-8", "replace")
                break
        answers.write(_ANSWER.pack(len(failure)) + failure)
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
