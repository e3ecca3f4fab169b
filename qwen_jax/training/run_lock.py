"""One job at a time in a run folder."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Holds a run folder, which is made if missing, for this process; a killed process lets go of it by itself.

    Raises:
      ValueError: another process holds it; names that process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or choose another "
                    f"folder"
                ) from error
            log.warning("%s is on a file system without locks (%s): start one job at a time in it", folder, error)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
