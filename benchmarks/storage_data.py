"""Rows of `benchmarks/storage.py` on data: training reads from a bucket, and a task is cached from and into one."""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from benchmarks.caching import write_corpus
from qwen_jax import files
from qwen_jax.data import loader as loading
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.remote_shards import ShardCache
from tests.object_stores import FaultProxy, Store, environment, servers

ROOT = Path(__file__).resolve().parents[1]
_BATCH = 16
_LENGTHS = (2048, 8192)
_SECONDS = 10.0


def cache_task(corpus: str, cache_dir: str, log: Path, length: int, workers: int) -> float:
    """Seconds of a command that caches a corpus."""
    command = [sys.executable, "tools/cache_task.py", "local_files", f"--cache_dir={cache_dir}", "--splits=train"]
    command += [f"--sequence_length={length}", f"--num_workers={workers}", f"--gin.local_files.pattern={corpus}"]
    began = time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            [*command, "--gin.local_files.validation_share=0.0"], cwd=ROOT, stderr=errors, stdout=errors
        )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {log.read_text()[-2000:]}")
    return time.perf_counter() - began


def upload(folder: Path, url: str) -> None:
    """Copies the files of a folder into a bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            files.copy_file(path, f"{url}/{path.relative_to(folder).as_posix()}")


def caching(arguments: argparse.Namespace) -> None:
    """`tools/cache_task.py` from text to packed examples; wanted: at least 0.8 of the local tokens per second."""
    with servers() as stores, FaultProxy(stores["s3"], arguments.latency) as proxy:
        with environment(stores["s3"].through(proxy)):
            _caching(stores["s3"], arguments)


def _caching(store: Store, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, url, walls = Path(name), store.folder(), {"local": [], "bucket": []}
        (folder / "corpus").mkdir()
        print(f"caching: {write_corpus(folder / 'corpus', arguments.megabytes * 1_000_000)}")
        upload(folder / "corpus", f"{url}/corpus")
        for turn in range(arguments.rounds):
            for where, place in (("local", name), ("bucket", url)):
                settings = (folder / "log", 2048, arguments.workers)
                walls[where].append(cache_task(f"{place}/corpus", f"{place}/cache{turn}", *settings))
                print(f"caching, {where:6}: {walls[where][-1]:6.1f} s; load {os.getloadavg()[0]:.1f}", flush=True)
        print(f"caching: {min(walls['local']) / min(walls['bucket']):.2f} of the local speed (wanted 0.8)")


def training(arguments: argparse.Namespace) -> None:
    """Batches in shuffled order; wanted: at least 1M tokens a second and process.

    The server is `object_reads.py`: moto behind the proxy gives some hundred records a second, with either reader.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        print(f"training: {write_corpus(folder / 'corpus', arguments.megabytes * 1_000_000)}")
        for length in _LENGTHS:
            cache_task(str(folder / "corpus"), str(folder / "cache"), folder / "log", length, 1)
        with _reads_only(folder, arguments.latency) as url:
            for length in _LENGTHS:
                for where, cache_dir, kept in (
                    ("local disk", folder / "cache", None),
                    ("bucket, by ranges", f"{url}/cache", None),
                    ("bucket, shards kept on a disk", f"{url}/cache", folder / f"kept{length}"),
                ):
                    speeds = [_read(str(cache_dir), length, kept, _SECONDS) for _ in range(arguments.rounds)]
                    wall, cpu = (max(column) / 1e6 for column in zip(*speeds, strict=True))
                    print(
                        f"training, length {length}, {where:30} {wall:6.2f}M tokens/s, {cpu:6.2f}M per CPU s of the "
                        f"reader (wanted 1M from a bucket); load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )


@contextlib.contextmanager
def _reads_only(folder: Path, latency: float) -> Generator[str]:
    """URL of a bucket whose objects are the files of a folder."""
    command = [sys.executable, str(Path(__file__).with_name("object_reads.py")), str(folder), str(latency)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # pipes
    try:
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        with environment({"AWS_ENDPOINT_URL": address, **credentials}):
            yield "s3://bucket-of-files"
    finally:
        process.stdin.close()
        process.wait()


def _read(cache_dir: str, length: int, kept: Path | None, seconds: float) -> tuple[float, float]:
    """Tokens per second, and per CPU second, of one process that reads batches one after the other."""
    cache = None if kept is None else _Announced(kept)
    before, loading.shard_cache = loading.shard_cache, lambda: cache
    try:
        loader = ExampleLoader("local_files", cache_dir=cache_dir, sequence_length=length)
    finally:
        loading.shard_cache = before
    batches = _batches(loader)
    next(batches)
    if cache is not None:
        cache.there.wait()
    tokens, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        tokens += next(batches)
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


class _Announced(ShardCache):
    """Says when a shard is there."""

    def __init__(self, folder: Path):
        super().__init__(folder, 1 << 40)
        self.there = threading.Event()

    def keep(self, shard, use) -> None:
        super().keep(shard, lambda path: (use(path), self.there.set()))


def _batches(loader: ExampleLoader) -> Iterator[int]:
    start = 0
    while True:
        yield int(loader.read(start, start + _BATCH)["loss_weights"].sum())
        start += _BATCH
