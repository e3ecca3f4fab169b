"""Locks on folders: by the kernel on local disks, by conditional writes in buckets."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import IO

from . import objects
from .paths import PathLike, RemotePath, as_path

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Seconds after which a lock in a bucket is free unless its owner has renewed it, which it does three times by then.
LEASE = 60.0
# Between two looks at a lock that is waited for.
TURN_SECONDS = 1.0


class InUseError(ValueError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def locked(folder: PathLike, file: str = LOCK_FILE, lease: float | None = None) -> Generator[None]:
    """Holds `folder`, which is made if missing, for this process; the lock of a killed process is released.

    In a bucket the lock is an object that names its owner and is renewed while it is held. The lock of a killed process
    is free when the time since the last renewal, by the clock of this process, is longer than its lease; until then
    this function waits, unless the owner renews it.

    Args:
      file: name of the lock file in `folder`.
      lease: in a bucket, seconds that the lock outlives its owner; None: `LEASE`.

    Raises:
      InUseError: another process holds it; the message names that process.
      ValueError: in a bucket, what lies there is no lock.
    """
    folder = as_path(folder)
    if isinstance(folder, RemotePath):
        with _Lease(folder, file, LEASE if lease is None else lease).held():
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _hold(folder / file):
        yield


@contextlib.contextmanager
def locked_in_turn(folder: PathLike, file: str = LOCK_FILE, lease: float | None = None) -> Generator[None]:
    """As `locked`, but waits, and says so, while another process holds the folder; no lock file stays.

    Raises:
      ValueError: in a bucket, what lies there is no lock.
    """
    path = as_path(folder) / file
    with contextlib.ExitStack() as stack:
        waits = False
        while True:
            try:
                stack.enter_context(locked(folder, file, lease))
                break
            except InUseError as error:
                if not waits:
                    log.warning("waiting for another process: %s", error)
                waits = True
                time.sleep(TURN_SECONDS)
        if not isinstance(path, RemotePath):  # there the lock removes its object itself
            stack.callback(path.unlink, missing_ok=True)
        yield


def _hold(path: Path) -> IO:
    """The file at `path`, made if missing, locked until it is closed; unlocked where the file system has no locks.

    Raises:
      InUseError: another process holds it.
    """
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                with file:
                    file.seek(0)
                    raise _in_use(path.parent, file.read().strip()) from error
            log.warning("%s is on a file system without locks (%s): start one job at a time in it", path.parent, error)
            return file
        if _lies_at(file, path):
            file.truncate(0)
            file.write(f"{_owner()}\n")
            file.flush()
            return file
        file.close()  # its last owner removed it after it was opened here


def _lies_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(folder: object, owner: str) -> InUseError:
    return InUseError(f"{folder} is in use by {owner or 'another process'}: wait for it, or choose another folder")


class _Lease:
    """The lock object of a folder in a bucket: {"owner", "id", "lease", "renewals"}."""

    def __init__(self, folder: RemotePath, file: str, lease: float):
        self._folder, self._path, self._lease = folder, folder / file, lease
        self._id, self._renewals = uuid.uuid4().hex, 0
        self._version: dict = {}
        self._ended, self._lost = threading.Event(), False

    def _content(self) -> bytes:
        self._renewals += 1
        row = {"owner": _owner(), "id": self._id, "lease": self._lease, "renewals": self._renewals}
        return json.dumps(row).encode()

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Holds the lock; a thread renews it."""
        self._take()
        thread = threading.Thread(target=self._renew, daemon=True, name=f"lock of {self._folder}")
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._release()

    def _take(self) -> None:
        seen: tuple[dict, float, dict] | None = None  # its version, when it was seen first, its content
        while not self._write("create" if seen is None else seen[0]):
            try:
                version = objects.head(self._path)
                content = json.loads(objects.get(self._path))
                owner, lease = content["owner"], float(content["lease"])
            except FileNotFoundError:
                seen = None  # released in the meantime
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._path} is not a lock of this software ({error}): choose another folder, or delete it"
                ) from error
            if content.get("id") == self._id:  # written, and the answer was lost
                self._version = version
                return
            if seen is not None and version["e_tag"] != seen[0]["e_tag"]:
                raise _in_use(self._folder, owner)
            seen = version, time.monotonic(), content
            log.warning("%s: the lock of %s is free unless it is renewed within %g s", self._folder, owner, lease)
            self._wait_for_renewal(version, owner, lease)

    def _wait_for_renewal(self, version: dict, owner: str, lease: float) -> None:
        """Returns once the lease has run out.

        Raises:
          ValueError: the owner has renewed it.
        """
        end = time.monotonic() + lease
        while (rest := end - time.monotonic()) > 0:
            time.sleep(min(rest, max(lease / 6, 0.02)))
            try:
                if objects.head(self._path)["e_tag"] != version["e_tag"]:
                    raise _in_use(self._folder, owner)
            except FileNotFoundError:
                return

    def _write(self, mode: object) -> bool:
        try:
            self._version = objects.put(self._path, self._content(), mode)
        except (FileExistsError, objects.ObjectChangedError):
            return False
        except FileNotFoundError as error:
            if mode == "create" or "no such object" not in str(error):
                raise
            return False
        return True

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(self._lease / 3):
            try:
                if self._write(self._version):
                    renewed = time.monotonic()
                    continue
                # Perhaps our own write, whose answer was lost.
                version = objects.head(self._path)
                if json.loads(objects.get(self._path)).get("id") == self._id:
                    self._version = version
                    continue
                self._lost = True
                log.error("%s: another process has taken the lock of this one over: stop one of them", self._folder)
                return
            except OSError as error:
                log.warning("%s: lock not renewed for %.0f s: %s", self._folder, time.monotonic() - renewed, error)

    def _release(self) -> None:
        if self._lost:
            return
        with contextlib.suppress(OSError, ValueError):
            if json.loads(objects.get(self._path)).get("id") == self._id:
                objects.delete(self._path, [self._path.key])
