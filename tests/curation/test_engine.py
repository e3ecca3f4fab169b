"""Curation on a distributed engine: Beam's runner for Dask, with a scheduler and workers in processes of their own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax.workers import open_workers
from tests import dask_cluster
from tests.test_workers import fail

pytest.importorskip("distributed", reason="needs the extra `dask`")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path, plain_environment):
    with dask_cluster.start(tmp_path, plain_environment) as found:
        yield found


def test_a_worker_killed_in_the_middle_loses_nothing(run, crawl, tmp_path, cluster, plain_environment):
    flags, workers = cluster
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
        *flags,
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
    flags, _ = cluster
    with open_workers(1, [flag.replace("--beam.", "--") for flag in flags]) as workers:
        with pytest.raises(OSError, match="^piece 0: no space left on device$"):
            workers("failing", fail, [(0,), (0,)], lambda pieces: [False for _ in pieces])
    with pytest.raises(ValueError, match="Did you mean --dask_client_address?"):
        with open_workers(1, ["--runner=DaskRunner", "--dask_client_adress=x"]):
            pass
