"""A run folder in use: `open_run` checks it, locks it, finishes rewinds and accounts for its time.

Pretraining, SFT and RLHF all use `open_run` and a `Trainer`.
"""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from qwen_jax import files
from qwen_jax.checkpoints.rewind import finish_rewinds, skipped_spans
from qwen_jax.checkpoints.run_folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, CheckpointError
from qwen_jax.distributed import hosts
from qwen_jax.distributed.preemption import PreemptionHandler
from qwen_jax.distributed.watchdog import Activity, Watchdog
from qwen_jax.training.goodput import GOODPUT_FILE, Goodput
from qwen_jax.training.profiling import MEMORY_PROFILE
from qwen_jax.training.spool import Spool, spooled

# Folder of a run that keeps compiled programs.
COMPILED = "compiled"


@dataclasses.dataclass
class Run:
    """A run folder that this job holds; made by `open_run`.

    Attributes:
      folder: OUTPUT_DIR.
      activity: current activity of the process, for the watchdog and for errors.
      goodput: the account of the run's time.
      spool: of a run in a bucket, the local folder whose files are uploaded while the run goes on.
    """

    folder: Path
    activity: Activity
    goodput: Goodput
    spool: Spool | None = None

    @property
    def local(self) -> Path:
        """The local folder for files that the run appends to."""
        return self.folder if self.spool is None else self.spool.local

    def skipped_examples(self, stream: str) -> list[tuple[int, int]]:
        """Spans [start, stop) of the order of a data stream that rewinds pass over."""
        return skipped_spans(self.folder, stream)

    def preemption(self) -> PreemptionHandler:
        """A context in which SIGTERM requests a save and a clean end."""
        return PreemptionHandler()


@contextlib.contextmanager
def open_run(
    folder: str | Path,
    check_same_run: Callable[[Path], None],
    *,
    watchdog: Watchdog | None = None,
    began: float | None = None,
) -> Generator[Run]:
    """Holds a run folder, new or old, while open. In a job, process 0 holds it for all.

    Args:
      check_same_run: raises if a run folder holds another run than the one that starts; called in process 0.
      watchdog: gets the folder, and is told of the activity.
      began: `time.time()` when the process started.

    Raises:
      CheckpointError: the folder is a file, holds something else than a run, or another run.
      ValueError: another process holds it.
    """
    folder, watchdog = files.as_path(folder, "OUTPUT_DIR"), watchdog or Watchdog()
    hosts.run_on_main(
        "output folder", "process 0 to look into OUTPUT_DIR", lambda: _check_folder(folder, check_same_run)
    )
    main = hosts.process_index() == 0
    with _held(folder) if main else contextlib.nullcontext():
        hosts.run_on_main("rewinds", "process 0 to set checkpoints aside", lambda: finish_rewinds(folder))
        with spooled(folder, (METRICS_FILE, GOODPUT_FILE) if main else ()) as spool:
            goodput = Goodput(folder if spool is None else spool.local, began)
            goodput.count("starting")
            watchdog.folder = folder
            yield Run(folder, watchdog.activity, goodput, spool)


@contextlib.contextmanager
def _held(folder: Path) -> Generator[None]:
    """Locks the folder, and removes it if it is new and holds the lock alone."""
    new = not files.is_remote(folder) and not folder.exists()
    try:
        with files.locked(folder):
            yield
    finally:
        # Not made: what kept it from that is the error to show.
        if new and folder.is_dir() and [path.name for path in folder.iterdir()] == [files.LOCK_FILE]:
            shutil.rmtree(folder)


def _check_folder(folder: Path, check_same_run: Callable[[Path], None]) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"OUTPUT_DIR {folder} is a file: choose a folder")
    if (folder / CONFIG_FILE).is_file():
        check_same_run(folder)
        return
    # Files of a start that ended before its first step: killed, hung, or out of memory.
    leftovers = re.compile(rf"\..*|{CHECKPOINTS}|{COMPILED}|{re.escape(MEMORY_PROFILE)}|stacks_\d+\.txt")
    there = sorted(path.name for path in folder.glob("*") if not leftovers.fullmatch(path.name))
    if there:
        raise CheckpointError(
            f"OUTPUT_DIR {folder} holds {there[0]!r} and is not a run folder: choose an empty or new folder"
        )
