"""Work with everything in a bucket against the same work on local disks, in turns in one run.

    python benchmarks/storage.py                    # all rows
    python benchmarks/storage.py curation --pages=4000

The bucket is of a server of S3 on loopback (moto), behind a proxy that adds 20 ms to each request. Both are Python
programs on the cores of the measured program, so the ratios are lower bounds.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

for _folder in ("", "tools"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))

from benchmarks.curation import make_pages, measured  # noqa: E402
from qwen_jax import files  # noqa: E402
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


ROWS: dict[str, Callable[[argparse.Namespace], None]] = {"curation": curation}


def main() -> None:
    """Prints the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="all by default")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds added to a request (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=4000, help="pages to curate (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that curate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns; the fastest counts (default: %(default)s)")
    arguments = parser.parse_args()
    for row in arguments.rows or ROWS:
        ROWS[row](arguments)


if __name__ == "__main__":
    main()
