"""Packed shards in buckets: records by ranged reads, several at a time, and a cache of whole shards on a local disk.

A record is asked for by its range in the object and checked by the index of the shard (`packed_index`). Meanwhile, with
`shard_cache.folder`, shards are downloaded one after the other, checked, and read from there.
"""

import concurrent.futures
import functools
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gin

from qwen_jax import files
from qwen_jax.data import packed_index
from qwen_jax.data.packed_index import PackedIndex, decode_record, record_offsets

logger = logging.getLogger(__name__)

# Requests of this process at a time: with 20 ms for each, 1,600 records a second.
_REQUESTS = 32
# Records that are asked for before they are needed; at 2,048 tokens some 20 MB.
_MOST_AHEAD = 2048
# No copy of a shard takes so long.
_SECONDS_OF_A_COPY = 86_400


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_REQUESTS, thread_name_prefix="packed examples")


class RemoteShard:
    """One shard of a bucket. Safe to use from several threads."""

    def __init__(self, path: Path, records: int, file_bytes: int, index_sha256: str):
        """Reads the index.

        Args:
            path: of the object.
            records, file_bytes, index_sha256: from the manifest (`packing.Shard`).

        Raises:
            FileNotFoundError: there is no such object.
            ValueError: the object is not the one of the manifest.
        """
        self.path, self._index_sha256 = path, index_sha256
        if index_sha256:
            index = path.with_name(path.name + packed_index.SUFFIX)
            try:
                self._index = PackedIndex.from_bytes(index.read_bytes(), index_sha256)
            except ValueError as error:
                raise ValueError(f"{index.name} beside it is damaged or was replaced: {error}") from error
        else:
            logger.warning("%s was packed without checksums: what is read is not checked; cache the task anew", path)
            size = path.stat().st_size
            if size != file_bytes:
                raise ValueError(f"it has {size} bytes, the manifest says {file_bytes}")
            self._index = PackedIndex(record_offsets(functools.partial(files.read_range, path), size), None)
        if len(self._index.offsets) != records + 1:
            raise ValueError(f"it has {len(self._index.offsets) - 1} records, the manifest says {records}")
        self._ahead: dict[int, concurrent.futures.Future[bytes]] = {}
        self._lock = threading.Lock()

    def read(self, records: Sequence[int]) -> list[bytes]:
        """The records with these numbers.

        Raises:
            OSError: the bucket gives no answer.
            ValueError: a record has not the checksum of the index: the object was replaced, or is damaged.
        """
        self.ask(records)
        with self._lock:
            asked = [self._ahead.pop(record, None) or self._submit(record) for record in records]
        return [one.result() for one in asked]

    def ask(self, records: Sequence[int]) -> None:
        """Asks for records that will be needed soon; forgets the ones asked for longest ago where they are too many."""
        with self._lock:
            for record in records:
                if record not in self._ahead:
                    self._ahead[record] = self._submit(record)
            for record in list(self._ahead)[: max(0, len(self._ahead) - _MOST_AHEAD - len(records))]:
                self._ahead.pop(record).cancel()

    def _submit(self, record: int) -> concurrent.futures.Future[bytes]:
        return _pool().submit(self._fetch, record)

    def _fetch(self, record: int) -> bytes:
        start, stop = self._index.span(record)
        return self._decode(record, files.read_range(self.path, start, stop))

    def _decode(self, record: int, chunk: bytes) -> bytes:
        if self._index.is_damaged(record, chunk):
            raise ValueError(f"record {record} has not the checksum of the index: the object was replaced or damaged")
        return decode_record(chunk, self._index.span(record)[0])

    def check(self, local: Path) -> None:
        """Checks a local copy.

        Raises:
            ValueError: it is not the shard of the index.
        """
        found = PackedIndex.of_file(local)
        if self._index.checksums is not None and found.to_bytes() != self._index.to_bytes():
            raise ValueError("the copy has not the checksums of the index: the object was replaced or damaged")

    @property
    def identity(self) -> str:
        """A name of this content, for local copies."""
        return hashlib.sha256(f"{self.path} {self._index_sha256}".encode()).hexdigest()[:24]


class ShardCache:
    """Copies of whole shards in a local folder, made one after the other by a thread.

    Several processes may share the folder, and each keeps below the limit what it adds; shards of other data go first,
    those that were used longest ago. A shard that does not fit stays in the bucket.
    """

    def __init__(self, folder: Path, most_bytes: int):
        """`most_bytes`: limit of all files in the folder."""
        self._folder, self._most_bytes = folder, most_bytes
        self._wanted: queue.SimpleQueue[tuple[RemoteShard, Callable[[Path], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._kept: set[Path] = set()

    def keep(self, shard: RemoteShard, use: Callable[[Path], None]) -> None:
        """Calls `use` from another thread with the local copy of a shard once it is there; never if it does not fit."""
        self._wanted.put((shard, use))
        with self._lock:
            if self._thread is None:
                # A daemon: the process ends without waiting for copies.
                self._thread = threading.Thread(target=self._work, daemon=True, name="shard cache")
                self._thread.start()

    def _work(self) -> None:
        while True:
            self._keep(*self._wanted.get())

    def _keep(self, shard: RemoteShard, use: Callable[[Path], None]) -> None:
        local = self._folder / f"{shard.identity}.array_record"
        try:
            self._kept.add(local)
            if not local.exists():
                if not self._make_room(shard.path.stat().st_size):
                    logger.info("%s: no room for another shard (shard_cache.gigabytes)", self._folder)
                    return
                files.copy_file(shard.path, local)
            shard.check(local)
            os.utime(local)
            use(local)
        except (OSError, ValueError) as error:
            local.unlink(missing_ok=True)
            # Reading goes on from the bucket, and fails there if it has to.
            logger.warning("%s is not kept in %s: %s", shard.path, self._folder, error)

    def _make_room(self, size: int) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(".*.tmp"):  # of processes that were killed
            if time.time() - path.stat().st_mtime > _SECONDS_OF_A_COPY:
                path.unlink(missing_ok=True)
        found = {path: path.stat() for path in self._folder.glob("*.array_record")}
        free = self._most_bytes - sum(status.st_size for status in found.values())
        for path in sorted(found.keys() - self._kept, key=lambda path: found[path].st_mtime):
            if free >= size:
                break
            path.unlink(missing_ok=True)
            free += found[path].st_size
        return free >= size


@gin.configurable
def shard_cache(folder: files.PathLike | None = None, gigabytes: float = 100.0) -> ShardCache | None:
    """The cache of packed shards that are in a bucket; None without a folder.

    Args:
        folder: a folder on a local disk.
        gigabytes: limit of its size.
    """
    if folder is None:
        return None
    path = files.as_path(folder, "shard_cache.folder")
    if files.is_remote(path):
        raise ValueError(f"shard_cache.folder is {path}: it must be on a local disk")
    return ShardCache(path, int(gigabytes * 1e9))
