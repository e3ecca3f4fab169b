"""Processes that compare two answers as mathematics, each with a limit on its time.

A process that takes too long is ended by the system and another one takes its place. Signals and threads of this
process play no part, so comparisons may be made from any thread, as many at once as there are processes.
"""

import atexit
import importlib.util
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 300.0
# Wall time is a multiple of the limit, which counts processor time: a busy machine changes no verdict.
_WALL_FACTOR = 20.0


class _Worker:
    def __init__(self):
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen_jax.evaluation.mathematics_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        if self._read(_START_SECONDS) != "ready":
            self.close()
            raise RuntimeError("the process that compares mathematical answers did not start: its errors stand above")

    def same(self, prediction: str, gold: str, seconds: float) -> bool | None:
        """Whether they are the same, or None: it took too long or too much memory, and the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([prediction, gold, seconds]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(seconds * _WALL_FACTOR)

    def _read(self, seconds: float):
        assert self._process.stdout is not None
        end, data, out = time.monotonic() + seconds, b"", self._process.stdout.fileno()
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(end - time.monotonic(), 0))
            more = os.read(out, 4096) if ready else b""
            if not more:
                return None
            data += more
        return json.loads(data)

    @property
    def ended(self) -> bool:
        """Whether the process has ended, such as by a kill from outside."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


class ComparisonProcesses:
    """At most `count` processes, started when they are needed.

    Args:
        count: of processes; None: as many as there are processors.
    """

    def __init__(self, count: int | None = None):
        self._free = threading.Semaphore(count or len(os.sched_getaffinity(0)))
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()

    def same(self, prediction: str, gold: str, seconds: float) -> bool:
        """Whether math-verify takes two answers in LaTeX for the same; False where it takes longer than `seconds`.

        Raises:
            ModuleNotFoundError: math-verify is not installed.
        """
        with self._free, self._worker() as workers:
            found = workers[0].same(prediction, gold, seconds)
            if found is None:
                log.warning("%r is taken for wrong: comparing it with %r took over %g s", prediction, gold, seconds)
                workers.pop().close()
        return bool(found)

    @contextmanager
    def _worker(self) -> Generator[list[_Worker]]:
        """A list with a worker of the caller's own; what is in it afterwards is given back."""
        try:
            while (worker := self._idle.get_nowait()).ended:
                worker.close()
            workers = [worker]
        except queue.Empty:
            if importlib.util.find_spec("math_verify") is None:
                raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify") from None
            workers = [_Worker()]
        try:
            yield workers
        except BaseException:
            workers.pop().close()  # a request may be under way in it
            raise
        for worker in workers:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the idle processes."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return


shared = ComparisonProcesses()
atexit.register(shared.close)
