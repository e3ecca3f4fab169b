"""Files that a run in a bucket appends to: written on a local disk, uploaded in the background.

Objects cannot be appended to. Metrics, the account of the time, TensorBoard's events and traces are local files, and a
thread uploads those that have changed, whole, every few seconds. Steps never wait for it. A fault that outlasts the
retries is logged, and the files are uploaded with the next round; at the end of the run it is an error.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path

from qwen_jax import files

log = logging.getLogger(__name__)

# Seconds between two rounds: an object that changes at each costs some 8,600 requests a day.
EVERY = 10.0
_HOME = "qwen_jax-runs"


@contextlib.contextmanager
def spooled(folder: Path, names: tuple[str, ...], every: float = EVERY) -> Generator["Spool | None"]:
    """A local folder whose files appear in `folder`, which is in a bucket; None where it is not.

    Args:
      names: files that a run goes on with; they are downloaded first, where there are any.
      every: seconds between two uploads.

    Raises:
      OSError: a file could not be uploaded at the end.
    """
    if not files.is_remote(folder):
        yield None
        return
    with _scratch() as local:
        for name in names:
            if (folder / name).is_file():
                files.copy_file(folder / name, local / name)
        spool = Spool(local, folder)
        thread = threading.Thread(target=spool.run, args=(every,), daemon=True, name=f"spool of {folder}")
        thread.start()
        try:
            yield spool
        finally:
            spool.ended.set()
            thread.join()
            spool.upload()


@contextlib.contextmanager
def _scratch() -> Generator[Path]:
    """A local folder for this process, which goes at its end; those of killed processes are removed first."""
    home = Path(tempfile.gettempdir()) / f"{_HOME}-{os.getuid()}"
    home.mkdir(parents=True, exist_ok=True)
    for left in home.iterdir():
        if not Path(f"/proc/{left.name.partition('-')[0]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    local = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=home))
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)


class Spool:
    """Uploads the files of a local folder that have changed; made by `spooled`.

    Attributes:
      local: the folder.
    """

    def __init__(self, local: Path, folder: Path):
        """Uploads nothing yet."""
        self.local, self._folder, self._lock = local, folder, threading.Lock()
        # What was downloaded is uploaded once more: its time is not known to be that of the object.
        self._sent: dict[str, tuple[int, int]] = {}
        self.ended = threading.Event()

    def run(self, every: float) -> None:
        """Uploads what has changed until the run ends."""
        while not self.ended.wait(every):
            try:
                self.upload()
            except OSError as error:
                log.warning("not uploaded, and tried again in %g s: %s", every, error)

    def upload(self) -> None:
        """Uploads the files that have changed since they were uploaded last."""
        with self._lock:
            self._upload()

    def _upload(self) -> None:
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local)
            hidden = any(part.startswith(".") for part in name.parts)
            if hidden or not path.is_file():
                continue
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
            if self._sent.get(str(name)) != stamp:
                files.copy_file(path, self._folder / str(name))
                self._sent[str(name)] = stamp
