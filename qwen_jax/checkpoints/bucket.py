"""The checkpoints of a run whose folder is in a bucket: Orbax writes them on local disks, then they are uploaded.

    checkpoints/STEP/…              files of Orbax, each uploaded by the process that wrote it
    checkpoints/STEP/commit.json    written last: {"step", "metadata", "files": {name: {"size", "sha256"}}}

A checkpoint counts where it has a commit file, which names all of its objects with their checksums. The upload runs in
the background: training waits for it only where the next checkpoint is due before the last one is uploaded.

Orbax 0.12 writes to gs:// by itself, and not to s3://: its paths and TensorStore's drivers take endpoints, credentials
and retries from two more places, a killed save leaves objects that only its own clean-up knows, and no checksum covers
what a bucket gives back. Local files cost each host the disk space of its part of two checkpoints. To resume, each
process downloads what its own devices need of a checkpoint that several processes wrote, and all of one that a single
process wrote (`qwen_jax.checkpoints.chunks`).
"""

import fcntl
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint.experimental.v1 as ocp

from qwen_jax import files
from qwen_jax.checkpoints.chunks import is_array_file, needed_files
from qwen_jax.checkpoints.manager import Checkpoints, check_keys, storage_options
from qwen_jax.checkpoints.run_folder import COMMIT_FILE, checksums, saved_steps
from qwen_jax.distributed import hosts

log = logging.getLogger(__name__)

# Seconds within which all processes of a job have uploaded their parts of a checkpoint, counted from the first.
UPLOAD_LIMIT = 3600.0
# The first descriptor that may stand for the folder of a process; below the usual limit of 1,024.
_DESCRIPTOR = 1000


class Spooled(Protocol):
    """Files of a run that are uploaded from a local folder: `training.spool.Spool`."""

    local: Path

    def upload(self) -> None:
        """Uploads what has changed."""


def open_checkpoints(folder: Path, keep: int, keep_every: int, spool: Spooled | None) -> Checkpoints:
    """The checkpoints of a run folder, on disks or in a bucket; see `Checkpoints`.

    Args:
      spool: of a run in a bucket; it is uploaded before each checkpoint is complete.
    """
    if not files.is_remote(folder):
        return Checkpoints(folder, keep, keep_every)
    return BucketCheckpoints(folder, keep, keep_every, spool)


def _open_folder(folder: Path) -> int:
    """A descriptor of a folder, of the same number in all processes of a job.

    Orbax wants one path in all processes, and those that share a host have folders of their own: `/proc/self/fd/N` is
    both. Orbax itself finds out where the numbers differ, and says so.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _DESCRIPTOR)
    finally:
        os.close(opened)


class BucketCheckpoints(Checkpoints):
    """As `Checkpoints`; each process of a job has its own local disk, or shares one."""

    def __init__(self, folder: Path, keep: int = 3, keep_every: int = 0, spool: Spooled | None = None):
        """Opens the checkpoints of the run folder; process 0 removes what a killed upload left.

        Args:
          keep, keep_every: as of `Checkpoints`.
          spool: of the run, whose local folder also holds what is on its way; None: in that of temporary files.
        """
        # Hidden, so that what is spooled from the same folder leaves it out.
        self._scratch = Path(tempfile.mkdtemp(prefix=".checkpoints-", dir=None if spool is None else spool.local))
        self._spool = spool
        self._descriptor = _open_folder(self._scratch)
        self._upload: threading.Thread | None = None
        # The order of openings and saves, equal in all processes, makes the keys of the job's store unique.
        self._opened = self._saves = 0
        self._error: BaseException | None = None
        super().__init__(folder, keep, keep_every)

    def _open(self):
        self._opened += 1
        what = "process 0 to remove what a killed upload left"
        hosts.run_on_main(f"remains/{self._opened}", what, self._remove_remains)

    def _remove_remains(self) -> None:
        complete = set(self.steps())
        for path in self.folder.iterdir():
            if path.name.isdigit() and int(path.name) not in complete:
                files.remove_tree(path)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return saved_steps(self.folder.parent)

    def save(self, step: int, trees: dict, metadata: dict) -> None:
        """As `Checkpoints.save`; waits for the upload of the last checkpoint, if that is under way."""
        if step == self._newest:
            return
        check_keys(trees)
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > 1:
            log.warning(
                "step %d waited %.0f s for the upload of the checkpoint before: save less often, or upload faster",
                *(step, waited),
            )
        self._newest = step
        local = self._scratch / str(step)
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = storage_options
        if jax.process_count() > 1:
            # Each process lays down all files of its part, as on a disk of its own, and one file for each part of an
            # array, so that the parts of all processes have names of their own.
            context.multiprocessing.primary_host = None
            context.array.saving.use_ocdbt = False
            # Made in the background, the folder of process 0 would let the others write before they have one.
            context.asynchronous.create_directories_asynchronously = False
            context.array.saving.use_replica_parallel = False
        with context:
            named = local if jax.process_count() == 1 else Path(f"/proc/self/fd/{self._descriptor}/{step}")
            response = ocp.save_checkpointables_async(str(named), trees, custom_metadata=metadata)
        self._saves += 1
        upload = functools.partial(self._carry_up, step, metadata, response.result, f"{step}.{self._saves}")
        self._upload = threading.Thread(target=upload, daemon=True, name=f"upload of checkpoint {step}")
        self._upload.start()

    def _carry_up(self, step: int, metadata: dict, written: Callable[[], object], key: str) -> None:
        local, final = self._scratch / str(step), self.folder / str(step)
        try:
            written()
            found = self._own(checksums(local), key)
            files.in_parallel(lambda name: files.copy_file(local / name, final / name), list(found))
            if self._spool is not None:
                self._spool.upload()  # the metrics of the steps before: they are not made again
            self._commit(final, {"step": step, "metadata": metadata, "files": found}, key)
        except BaseException as error:  # raised by `wait`, in the thread that trains
            self._error = error
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _own(self, found: dict[str, dict], key: str) -> dict[str, dict]:
        """The files that this process uploads: where several processes have a name, the first of them uploads it.

        Each process writes what describes the whole checkpoint, with a time in it: mixed, no checksums would fit.
        """
        process, count = hosts.process_index(), hosts.process_count()
        if count > 1:
            hosts.put(f"written/{key}/{process}", list(found))
        for other in range(process):
            what = f"process {other} to write its part of the checkpoint"
            theirs = set(hosts.wait_for(f"written/{key}/{other}", what, UPLOAD_LIMIT))
            found = {name: one for name, one in found.items() if name not in theirs}
        return found

    def _commit(self, final: Path, commit: dict, key: str) -> None:
        """Writes the commit file in process 0, once all processes have uploaded their parts."""
        process, count = hosts.process_index(), hosts.process_count()
        if count > 1:
            hosts.put(f"uploaded/{key}/{process}", commit["files"])
        if process:
            hosts.wait_for(f"committed/{key}", "process 0 to complete the checkpoint", UPLOAD_LIMIT)
            return
        for other in range(1, count):
            what = f"process {other} to upload its part of the checkpoint"
            commit["files"] |= hosts.wait_for(f"uploaded/{key}/{other}", what, UPLOAD_LIMIT)
        files.write_json(final / COMMIT_FILE, commit, indent=None)
        self._retain()
        if count > 1:
            hosts.put(f"committed/{key}", True)

    def _retain(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                files.remove_tree(self.folder / str(step), first=COMMIT_FILE)

    def wait(self) -> None:
        """Returns when the last save is complete in the bucket.

        Raises:
          Exception: the error of the save or upload.
        """
        if self._upload is not None:
            self._upload.join()
            self._upload = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _load(self, step: int, abstract: dict) -> dict:
        """Downloads what this process needs, compares it with its checksums, and restores each shard to its device."""
        source, local = self.folder / str(step), self._scratch / f"restored-{step}"
        commit = files.read_json(source / COMMIT_FILE)

        def fetch(names: list[str]) -> None:
            files.in_parallel(lambda name: files.copy_file(source / name, local / name), names)
            for name, found in checksums(local).items():
                if found != commit["files"][name]:
                    raise ValueError(f"{source / name}: its checksum is not the one of {COMMIT_FILE}")

        try:
            names = sorted(commit["files"])
            described = [name for name in names if is_array_file(name)]
            fetch(described)
            needed = needed_files(names, lambda name: (local / name).read_text(), abstract)
            fetch(sorted({*needed} - {*described}))
            return ocp.load_checkpointables(str(local), abstract)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _stop(self) -> None:
        """Has nothing open that knows the steps."""

    def close(self) -> None:
        """Waits for the last upload."""
        try:
            self.wait()
        finally:
            os.close(self._descriptor)
            shutil.rmtree(self._scratch, ignore_errors=True)
