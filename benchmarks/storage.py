"""Work with everything in a bucket against the same work on local disks, in turns in one run.

    python benchmarks/storage.py                    # all rows
    python benchmarks/storage.py curation --pages=4000

The bucket is of a server of S3 on loopback (moto), behind a proxy that adds 20 ms to each request. Both are Python
programs on the cores of the measured program, so the ratios are lower bounds.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import jax
import jax.numpy as jnp

for _folder in ("", "tools"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))

from benchmarks import conversion as conversions  # noqa: E402
from benchmarks.curation import make_pages, measured  # noqa: E402
from benchmarks.storage_data import caching, training  # noqa: E402
from qwen_jax import files  # noqa: E402
from qwen_jax.checkpoints.bucket import open_checkpoints  # noqa: E402
from qwen_jax.conversion import convert, load_pretrained  # noqa: E402
from tests.object_stores import FaultProxy, Store, environment, servers  # noqa: E402

_ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def bucket(latency: float) -> Generator[Store]:
    """An S3 bucket, `latency` seconds away; the environment of this process names it."""
    with servers() as stores, FaultProxy(stores["s3"], latency) as proxy, environment(stores["s3"].through(proxy)):
        yield stores["s3"]


def curation(arguments: argparse.Namespace) -> None:
    """`tools/curate.py` from WARC; wanted: at least 0.8 of the local pages per second."""
    with tempfile.TemporaryDirectory() as name, bucket(arguments.latency) as store:
        folder, url = Path(name), store.folder()
        (folder / "crawl").mkdir()
        make_pages(folder / "crawl", arguments.pages)
        for path in (folder / "crawl").iterdir():
            files.copy_file(path, f"{url}/crawl/{path.name}")
        walls: dict[str, list[float]] = {}
        for turn in range(arguments.rounds):
            for place in (name, url):
                command = [sys.executable, str(_ROOT / "tools" / "curate.py"), f"--input={place}/crawl"]
                command += [f"--output={place}/corpus{turn}", f"--num_workers={arguments.workers}"]
                wall, cpu = measured(command, folder / "log")
                where = "local" if place == name else "bucket"
                walls.setdefault(where, []).append(wall)
                print(
                    f"curation, {where:6}: {wall:6.1f} s, {arguments.pages / wall:6.0f} pages/s; CPU {cpu:6.1f} s; "
                    f"load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
        print(f"curation: {min(walls['local']) / min(walls['bucket']):.2f} of the local pages/s (wanted 0.8)")


def conversion(arguments: argparse.Namespace) -> None:
    """Safetensors converted from bucket to bucket, and a run folder read out of one; wanted: 0.5 of copying's bytes/s.

    The copy goes file after file by the same library: down to a local disk and up again, or down alone.
    """
    config = dataclasses.replace(conversions.SIZES["1_8b"], num_layers=1)
    config = dataclasses.replace(config, vocab_size=arguments.rows_of_vocabulary)
    best: dict[str, float] = {}

    def timed(what: str, size: float, work: Callable[[], object]) -> None:
        began, used = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        best[what] = max(best.get(what, 0.0), size / wall)
        print(f"{what:32}: {size / wall:6.1f} MB/s; CPU {cpu:5.1f} s; load {os.getloadavg()[0]:.1f}", flush=True)

    with tempfile.TemporaryDirectory() as name, bucket(arguments.latency) as store:
        folder, url = Path(name), files.as_path(store.folder())
        conversions.make(folder / "made", config)
        for path in (folder / "made" / "qwen").iterdir():
            files.copy_file(path, url / "qwen" / path.name)
        convert("qwen", url / "qwen", "orbax", url / "run", progress=False)
        sizes = {one: sum(path.stat().st_size for path in (url / one).rglob("*") if path.is_file()) / 1e6
                 for one in ("qwen", "run")}  # fmt: skip

        def copy(one: str, up: bool) -> None:
            for path in [path for path in (url / one).rglob("*") if path.is_file()]:
                local = folder / "copied" / str(path.relative_to(url))
                files.copy_file(path, local)
                if up:
                    files.copy_file(local, url / "copied" / str(path.relative_to(url)))

        for turn in range(arguments.rounds):
            target = url / f"qwen2_{turn}"
            timed("copy of safetensors", sizes["qwen"], lambda: copy("qwen", True))
            timed(
                "qwen to qwen2",
                sizes["qwen"],
                functools.partial(convert, "qwen", url / "qwen", "qwen2", target, progress=False),
            )
            timed("copy of a run folder", sizes["run"], lambda: copy("run", False))
            timed("load_pretrained of a run folder", sizes["run"], lambda: load_pretrained(url / "run"))
    for what, peer in (("qwen to qwen2", "copy of safetensors"), (list(best)[-1], "copy of a run folder")):
        print(f"{what}: {best[what] / best[peer]:.2f} of the bytes/s of a {peer} (wanted 0.5)")


def checkpoints(arguments: argparse.Namespace) -> None:
    """How long saving holds a step up; wanted: at most 1.1 of what a local checkpoint does.

    Each turn saves once in each place, the checkpoint before being complete, and then makes some steps, beside which
    the files are written. The first turn is not counted.
    """
    size = arguments.megabytes_of_arrays * 1_000_000 // 4 // 3
    ones = jnp.ones((4, size // 4), jnp.float32)
    trees = {"params": {"layers": {"w": ones}}, "optimizer": {"first": {"w": ones + 1}, "second": {"w": ones + 2}}}
    metadata, some = {"positions": {"train": 0}}, jnp.ones((512, 512))
    advance = jax.jit(lambda x: jnp.tanh(x @ x))

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def steps() -> None:
        result = some
        for _ in range(20):
            result = advance(result)
        result.block_until_ready()

    steps()
    with tempfile.TemporaryDirectory() as name, bucket(arguments.latency) as store:
        places = {"local": Path(name) / "run", "bucket": files.as_path(store.folder("run"))}
        opened = {where: open_checkpoints(place, 1, 0, None) for where, place in places.items()}
        figures: dict[str, list[tuple[float, ...]]] = {where: [] for where in places}
        for turn in range(3 * arguments.rounds + 1):
            for where, one in opened.items():
                row = (
                    seconds(steps),
                    seconds(lambda one=one, turn=turn: one.save(turn, trees, metadata)),
                    seconds(steps),
                    seconds(one.wait),
                )
                figures[where] += [row] if turn else []
        for one in opened.values():
            one.close()
    held = {}
    for where, rows in figures.items():
        quiet, held[where], beside, rest = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"checkpoint of {arguments.megabytes_of_arrays} MB, {where:6}: saving holds a step up for "
            f"{1e3 * held[where]:6.1f} ms; complete {beside + rest:5.1f} s later; 20 steps take {beside / quiet:.2f} "
            f"of their time beside it; load {os.getloadavg()[0]:.1f}"
        )
    print(f"checkpoint: {held['bucket'] / held['local']:.2f} of the time that a local one holds a step up (wanted 1.1)")


ROWS: dict[str, Callable[[argparse.Namespace], None]] = {
    "curation": curation,
    "caching": caching,
    "training": training,
    "conversion": conversion,
    "checkpoints": checkpoints,
}


def main() -> None:
    """Prints the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="all by default")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds added to a request (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=4000, help="pages to curate (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that curate or cache (default: %(default)s)")
    parser.add_argument(
        "--rows_of_vocabulary", type=int, default=8192, help="of the model to convert, of 168 MB (default: %(default)s)"
    )
    parser.add_argument(
        "--megabytes_of_arrays", type=int, default=24, help="of a checkpoint that is saved (default: %(default)s)"
    )
    parser.add_argument("--megabytes", type=int, default=8, help="of text to cache (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns; the fastest counts (default: %(default)s)")
    arguments = parser.parse_args()
    for row in arguments.rows or ROWS:
        ROWS[row](arguments)


if __name__ == "__main__":
    main()
