"""Tokens per second that training is fed with: our loader against SeqIO's own `get_dataset`, on one cache, in one run.

    python benchmarks/loader.py
    python benchmarks/loader.py --cache_dir=runs/cache --sequence_length=2048 --seconds=10

Both read the task `python_corpus` that `qwen_jax.data.cache` made, shuffled and without end, and give numpy arrays
[batch, length]. SeqIO reads its cache of documents and packs them as it goes (`DecoderFeatureConverter(pack=True)`, the
way t5x is fed), with all threads that tf.data likes; ours reads examples that were packed beforehand, from one thread
and from two. Only tokens that are no filling count. Measurements take turns; the medians are printed. Before each one
the kernel is asked to forget the files, but the corpus is small: after the first pass they are in its memory. So the
first pass of ours is measured too, from the opening of the files on.
"""

import argparse
import concurrent.futures
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax.command_line import path_argument, quiet, run  # noqa: E402

TASK = "python_corpus"


def forget(folder: Path) -> None:
    """Asks the kernel to drop the files below `folder` from its cache, where the platform can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(cache_dir: Path, length: int, batch: int, threads: int) -> Iterator[int]:
    """Tokens of one batch after the other; `threads` batches are read at a time."""
    from qwen_jax.data.loader import ExampleLoader

    loader = ExampleLoader(TASK, cache_dir=cache_dir, sequence_length=length)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(loader.read, i * batch, (i + 1) * batch) for i in range(threads)]
        start = threads * batch
        while True:
            read = ahead.pop(0).result()
            ahead.append(pool.submit(loader.read, start, start + batch))
            start += batch
            yield int(read["loss_weights"].sum())


def seqio_dataset(cache_dir: Path, length: int, batch: int) -> Iterator[int]:
    """The same from SeqIO's cached task, packed on the fly."""
    import seqio
    import tensorflow as tf

    seqio.add_global_cache_dirs([str(cache_dir)])
    dataset = seqio.get_dataset(
        TASK,
        task_feature_lengths={"targets": length},
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=0,
        use_cached=True,
        feature_converter=seqio.DecoderFeatureConverter(pack=True),
    )
    for read in dataset.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        yield int(read["decoder_loss_weights"].sum())


def tokens_per_second(batches: Iterator[int], seconds: float) -> float:
    """Of `seconds` after the first batch, which opens files."""
    next(batches)
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        tokens += next(batches)
    return tokens / (time.perf_counter() - began)


def first_pass(cache_dir: Path, length: int, batch: int, num_batches: int) -> float:
    """Tokens per second of our loader over files that the kernel was asked to forget, from one thread."""
    forget(cache_dir)
    began = time.perf_counter()
    batches = ours(cache_dir, length, batch, 1)
    tokens = sum(next(batches) for _ in range(num_batches))
    return tokens / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    """Makes the cache if it is not there, measures, prints a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache_dir", type=path_argument, help="where to cache the task (default: a folder that goes again)"
    )
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a batch")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        _measure(arguments, arguments.cache_dir or Path(temporary))


def _measure(arguments: argparse.Namespace, cache_dir: Path) -> None:
    with quiet():
        from qwen_jax.data import cache

    logging.getLogger("absl").setLevel(logging.WARNING)
    length, batch = arguments.sequence_length, arguments.batch
    (prepared,) = cache.prepare(TASK, cache_dir=cache_dir, sequence_length=length, splits=("train",))
    size = f"{prepared.manifest.tokens:,} tokens, {prepared.manifest.records:,} examples of {length}"
    print(f"{TASK}: {size}; batches of {batch}; {os.cpu_count()} cores")
    peer = "SeqIO get_dataset, packing"
    measured: dict[str, Callable[[], Iterator[int]]] = {
        peer: lambda: seqio_dataset(cache_dir, length, batch),
        "ExampleLoader, 1 thread": lambda: ours(cache_dir, length, batch, 1),
        "ExampleLoader, 2 threads": lambda: ours(cache_dir, length, batch, 2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(arguments.rounds):
        for name, batches in measured.items():
            forget(cache_dir)
            speeds[name].append(tokens_per_second(batches(), arguments.seconds))
    passes = [first_pass(cache_dir, length, batch, prepared.manifest.records // batch) for _ in range(arguments.rounds)]
    speeds["ExampleLoader, first pass"] = passes
    base = statistics.median(speeds[peer])
    print(f"{'':28} {'tokens/s':>14} {'lowest':>14} {'highest':>14} {'ratio':>7}")
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"{name:28} {middle:>14,.0f} {min(values):>14,.0f} {max(values):>14,.0f} {middle / base:>7.2f}")


if __name__ == "__main__":
    run(main)
