"""Independent pieces of work: in this process, in worker processes of this machine, or on an engine of Apache Beam.

A piece is a call that writes a file or folder which appears whole or not at all, so it may be done twice, anywhere.
What is run depends on `num_workers` and `beam_options` alone, never what is written.

Workers are started once and serve all stages of a run. They end with the process that started them, also when it is
killed.
"""

import concurrent.futures
import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

from qwen_jax import files

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10
# One worker is one core: the threads of numpy's products would fight over those of the others.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class LostWorkerError(ValueError):
    """A worker process was killed. What others have written is there, and the same call goes on from it."""


class Workers(Protocol):
    """What `open_workers` gives."""

    def __call__(
        self,
        label: str,
        function: Callable[..., object],
        pieces: Sequence[tuple],
        done: Callable[[Sequence[tuple]], list[bool]],
        reads: Callable[..., Sequence[Path]] | None = None,
    ) -> None:
        """Calls `function(*piece)` for each piece; returns when all are done.

        Args:
          label: name of the stage, for progress and errors.
          function: can be pickled, unless it is called in this process; its result is ignored.
          pieces: the calls, those that take longest first.
          done: of some pieces, whether the output of each is there. All are asked about together, since an answer of
            a bucket takes its time.
          reads: of a piece, as arguments, the files that it reads first. In this process those of the next piece are
            opened while one is worked on; elsewhere nobody knows who does the next.

        Raises:
          LostWorkerError: a worker was killed.
          ValueError, OSError: as `qwen_jax.beam.short_errors`; and what `function` raises.
          RuntimeError: the output of a piece is missing though no call failed.
        """
        ...


@contextlib.contextmanager
def open_workers(
    num_workers: int = 1, beam_options: Sequence[str] = (), preload: Sequence[str] = ()
) -> Generator[Workers]:
    """Workers for several stages, which are stopped when the block ends.

    Args:
      num_workers: processes on this machine; 1 works in this process.
      beam_options: options of Beam, with a `--runner`; empty for this machine.
      preload: modules that worker processes share, so that each starts in no time.

    Raises:
      ValueError: fewer than one worker, both kinds of workers, Beam options without a runner, or unknown ones.
    """
    if num_workers < 1:
        raise ValueError(f"{num_workers} workers: give at least 1")
    if beam_options and num_workers > 1:
        raise ValueError("num_workers is for this machine, a Beam runner has workers of its own: give one of the two")
    if beam_options:
        from qwen_jax import beam  # here, because work on this machine needs no Beam

        with beam.open_engine(beam_options) as run:
            yield functools.partial(_checked, run)
    elif num_workers > 1:
        with _Processes(num_workers, preload) as run:
            yield functools.partial(_checked, run)
    else:
        yield functools.partial(_checked, _here)


def _checked(
    run, label: str, function: Callable, pieces: Sequence[tuple], done: Callable, reads: Callable | None = None
) -> None:
    if not pieces:
        return
    if run is _here:
        _here(label, function, pieces, reads or (lambda *_: ()))
    else:
        run(label, function, pieces, done)
    lost = [piece for piece, is_done in zip(pieces, done(pieces), strict=True) if not is_done]
    if lost:
        raise RuntimeError(f"{label}: the output of {len(lost)} of {len(pieces)} pieces is missing, first {lost[0]}")


def _here(label: str, function: Callable, pieces: Sequence[tuple], reads: Callable[..., Sequence[Path]]) -> None:
    progress = Progress(label, len(pieces))
    with files.UploadsBehind() as work:
        try:
            for number, piece in enumerate(pieces, 1):
                files.begin_reading([path for one in pieces[number - 1 : number + 1] for path in reads(*one)])
                work(function, *piece)
                progress(number)
        finally:
            files.begin_reading([])


class Progress:
    """Logs how many pieces of a stage are done: now and then, and at the end."""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._logged = label, total, time.monotonic()

    def __call__(self, number: int) -> None:
        """`number`: pieces done so far."""
        if number == self._total or time.monotonic() - self._logged > _PROGRESS_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s: %d of %d pieces are done", self._label, number, self._total)


class _Processes:
    """Worker processes of this machine: started at the first stage, forked from one that has the imports."""

    def __init__(self, num_workers: int, preload: Sequence[str]):
        self._num_workers, self._preload = num_workers, list(preload)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._stages = 0

    def __enter__(self) -> "_Processes":
        self._folder = tempfile.TemporaryDirectory(prefix="qwen_jax-workers-")
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()

    def __call__(self, label: str, function: Callable, pieces: Sequence[tuple], done: Callable) -> None:
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(self._preload)
            with _environment(_ONE_THREAD):
                arguments = (dict(os.environ), context.Barrier(self._num_workers))
                self._pool = concurrent.futures.ProcessPoolExecutor(
                    self._num_workers, mp_context=context, initializer=_begin, initargs=arguments
                )
                self._pool.submit(os.getpid).result()  # starts the server, with this environment
        # Written once a stage: a description of a large corpus would take long to send with every piece.
        # Under a new name each time, for workers keep the last one that they read.
        self._stages += 1
        file = Path(self._folder.name) / f"stage-{self._stages}"
        file.write_bytes(pickle.dumps(function))
        futures = [self._pool.submit(_call, file, piece) for piece in pieces]
        progress = Progress(label, len(pieces))
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                progress(number)
            if any(future.result() for future in futures):
                for finished in [self._pool.submit(_finish_uploads) for _ in range(self._num_workers)]:
                    finished.result()
        except BrokenProcessPool as error:
            raise LostWorkerError(
                f"{label}: a worker process was killed, as the system does where memory is short: give fewer workers, "
                "and the same command goes on from here"
            ) from error
        finally:
            for future in futures:
                future.cancel()


@functools.lru_cache(maxsize=1)
def _load(file: Path) -> Callable:
    return pickle.loads(file.read_bytes())


_at_work = _interrupted = False
_uploads = files.UploadsBehind()
_all_workers: threading.Barrier  # of a worker process


def _call(file: Path, piece: tuple) -> bool:
    """Does a piece; returns whether this worker is still uploading."""
    global _at_work
    _at_work = True
    try:
        _uploads(_load(file), *piece)
    finally:
        _at_work = False
    return _uploads.waiting


def _finish_uploads() -> None:
    """Waits for the uploads of this worker, and then for the other workers, so that each does this once."""
    try:
        _uploads.wait()
    finally:
        _all_workers.wait()


def _interrupt(*_) -> None:
    """Ctrl-C, which comes to all processes: a piece removes what is unfinished; who has none ends without a word."""
    global _interrupted
    if not _at_work:
        if not _interrupted:
            _interrupted = True
            _uploads.settle()
        os._exit(1)
    raise KeyboardInterrupt


def _begin(environment: dict[str, str], all_workers: threading.Barrier) -> None:
    global _all_workers
    _all_workers = all_workers
    # The server that workers are forked from has the environment of the first run in its process.
    os.environ.update(environment)
    # What is made stays where another piece fails: before Python's own end, which starts no threads for uploads.
    multiprocessing.util.Finalize(None, _uploads.settle, exitpriority=100)
    signal.signal(signal.SIGINT, _interrupt)
    launcher = multiprocessing.parent_process()
    assert launcher is not None  # this runs in a worker

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
