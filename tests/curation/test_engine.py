"""Curation on a distributed engine: Beam's runner for Dask, with a scheduler and workers in processes of their own."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax.workers import open_workers
from tests.test_workers import fail

pytest.importorskip("distributed", reason="needs the extra `dask`")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path, plain_environment):
    """The file with the address of the scheduler, and two worker processes, which no one starts again."""
    address = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    commands = [[*dask, "scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard", f"--scheduler-file={address}"]]
    commands += [[*dask, "worker", f"--scheduler-file={address}", "--nthreads=1", "--no-nanny", "--no-dashboard"]] * 2
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            process = subprocess.Popen(command, cwd=ROOT, env=plain_environment, stderr=subprocess.DEVNULL)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield address, processes[1:]


def test_a_worker_killed_in_the_middle_loses_nothing(run, crawl, tmp_path, cluster, plain_environment):
    address, workers = cluster
    output = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "tools" / "curate.py"),
        f"--input=books={crawl}/books",
        f"--input=web={crawl}/web",
        f"--output={output}",
        f"--config={ROOT}/gin/curation/english_and_chinese.gin",
        "--gin.make_config.weights={'books': 2.5}",
        f"--gin.benchmarks.patterns={crawl}/benchmark.jsonl",
        "--gin.make_config.documents_per_part=40",
        "--gin.make_config.unit_bytes=10000",
        "--max_unread_share=1",
        "--beam.runner=DaskRunner",
        f"--beam.dask_scheduler_file={address}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=plain_environment) as process:
        try:
            # Two folders under temporary names: each worker is in the middle of a piece.
            while len(list(output.glob("work/extract/.*.tmp"))) < 2:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.005)
            workers[0].send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert workers[1].poll() is None and "Traceback" not in errors

    def contents(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(output) == contents(run.folder)


def test_an_error_of_a_worker_is_the_users(cluster):
    address, _ = cluster
    options = ["--runner=DaskRunner", f"--dask_scheduler_file={address}"]
    with open_workers(1, options) as workers:
        with pytest.raises(OSError, match="^piece 0: no space left on device$"):
            workers("failing", fail, [(0,), (0,)], lambda _: False)
    with pytest.raises(ValueError, match="Did you mean --dask_client_address?"):
        with open_workers(1, ["--runner=DaskRunner", "--dask_client_adress=x"]):
            pass
