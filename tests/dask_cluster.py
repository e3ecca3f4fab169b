"""A Dask cluster for tests of Beam's runner for it: a scheduler and workers in processes of their own."""

import contextlib
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def start(
    folder: Path, environment: Mapping[str, str], num_workers: int = 2
) -> Generator[tuple[list[str], list[subprocess.Popen]]]:
    """Flags of a tool that name the cluster, and its worker processes, which no one starts again."""
    address = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    commands = [[*dask, "scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard", f"--scheduler-file={address}"]]
    worker = [*dask, "worker", f"--scheduler-file={address}", "--nthreads=1", "--no-nanny", "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        processes = []
        for command in [*commands, *[worker] * num_workers]:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield ["--beam.runner=DaskRunner", f"--beam.dask_scheduler_file={address}"], processes[1:]
