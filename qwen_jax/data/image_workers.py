"""Pictures decoded by worker processes, ahead of the devices.

Encoded files go to a worker through a pipe, and pixels come back in memory that both share, so nothing is pickled. A
worker is `python -m qwen_jax.data.image_workers`: it imports Pillow and NumPy, Numba if it is there
(`qwen_jax.data.fast_resize`), and nothing that trains. It ends when the process that started it does. A file that kills
its worker is named, and another worker takes the place.
"""

import collections
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
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwen_jax.data.images import UnusableImageError, decode_into, squash

# Pictures of a request: several, so that a worker does not wait for the next one after each.
CHUNK = 8
# Requests that a worker has at a time: it decodes one while the pixels of the other are copied and the next is sent.
_SIDES = 2
# A request of photographs as a rule, so that the sender need not wait until it is read.
_PIPE_BYTES = 1 << 20
# Side of the shared memory, pictures, number of the first one and of all; and number and length of what failed.
_REQUEST, _ANSWER = struct.Struct("<IIII"), struct.Struct("<I")


class ImageWorkers:
    """Worker processes that decode and resize pictures.

    `decode` may be called from several threads. Workers start with the first call, and end with `close` or when nothing
    refers to this any more.
    """

    def __init__(self, size: int, num_workers: int, numba: bool = True):
        """Starts nothing yet.

        Args:
            size: height and width of the decoded pictures.
            num_workers: processes; one for each core that the devices leave free.
            numba: whether `fast_resize` is used where it can be.

        Raises:
            ValueError: there would be no worker.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}: it takes at least one process to decode")
        self._size, self._num_workers, self._numba = size, num_workers, numba
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
            worker = worker or _Worker(self._size, self._numba)
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

    def __init__(self, size: int, numba: bool):
        self.ended = False
        shape = (_SIDES, CHUNK, size, size, 3)
        with _shared_file(int(np.prod(shape))) as file:
            self._pixels = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8).reshape(shape)
            package = Path(__file__).resolve().parents[2]
            paths = [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qwen_jax.data.image_workers", *map(str, (file.fileno(), size, int(numba)))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                pipesize=_PIPE_BYTES,
            )

    def decode(self, chunks, result: np.ndarray, total: int) -> None:
        """Decodes chunks (first picture, files) into their places in `result`."""
        asked: collections.deque[tuple[int, int, int]] = collections.deque()
        error = None
        for number, (start, files) in enumerate(chunks):
            side = number % _SIDES
            try:
                self._send(side, start, files, total)
            except BrokenPipeError as broken:
                while asked:  # the first request without an answer ended the process, not the one that is sent
                    error = self._receive(*asked.popleft(), total, result) or error
                ended = self._ended(start, len(files), total)
                raise error or ended from broken
            asked.append((side, start, len(files)))
            if len(asked) == _SIDES:
                error = self._receive(*asked.popleft(), total, result)
                if error is not None:
                    break
        while asked:  # also after an error, or its answer would be taken for that of the next call
            error = self._receive(*asked.popleft(), total, result) or error
        if error is not None:
            raise error

    def _send(self, side: int, start: int, files: Sequence[bytes], total: int) -> None:
        """Asks for the pixels of a chunk; raises BrokenPipeError where the process is gone."""
        assert self._process.stdin is not None
        header = _REQUEST.pack(side, len(files), start, total)
        self._process.stdin.write(header + struct.pack(f"<{len(files)}Q", *map(len, files)))
        for file in files:
            self._process.stdin.write(file)
        self._process.stdin.flush()

    def _receive(self, side: int, start: int, count: int, total: int, result: np.ndarray) -> UnusableImageError | None:
        """Takes the pixels of a chunk, or gives the error of one of its pictures."""
        assert self._process.stdout is not None
        header = self._process.stdout.read(_ANSWER.size)
        if len(header) < _ANSWER.size:
            raise self._ended(start, count, total)
        (length,) = _ANSWER.unpack(header)
        if length:
            reason, _, message = self._process.stdout.read(length).decode("utf-8", "replace").partition("\n")
            return UnusableImageError(message, reason)
        result[start : start + count] = self._pixels[side, :count]
        return None

    def _ended(self, start: int, count: int, total: int) -> UnusableImageError:
        self.ended = True
        status = self._process.wait()
        return UnusableImageError(
            f"one of the pictures {start} to {start + count - 1} of {total} ended the process that decoded it (exit "
            f"status {status}): leave it out, or give the machine more memory",
            "a picture that ended its process",
        )

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


def serve(file: int, size: int, numba: bool) -> None:
    """The loop of a worker: reads requests from standard input, answers on standard output, ends with its input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides what an interrupt means
    pixels = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(_SIDES, CHUNK, size, size, 3)
    requests, answers, resize = sys.stdin.buffer, sys.stdout.buffer, fastest_resize() if numba else squash
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        side, count, start, total = _REQUEST.unpack(header)
        lengths = struct.unpack(f"<{count}Q", requests.read(8 * count))
        images = [requests.read(length) for length in lengths]
        failure = b""
        for number, data in enumerate(images):
            try:
                decode_into(data, pixels[side, number], f"picture {start + number} of {total}", resize)
            except UnusableImageError as error:
                failure = f"{error.reason}\n{error}".encode("utf-8", "replace")
                break
        answers.write(_ANSWER.pack(len(failure)) + failure)
        answers.flush()


def fastest_resize() -> Callable[[Image.Image, int], np.ndarray]:
    """`images.squash`, or that of `fast_resize` where Numba is installed and gives the pixels of this Pillow."""
    try:
        from qwen_jax.data import fast_resize
    except (ImportError, RuntimeError):  # RuntimeError: there is no folder that Numba may keep its programs in
        return squash
    return fast_resize.squash if fast_resize.agrees() else squash


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
