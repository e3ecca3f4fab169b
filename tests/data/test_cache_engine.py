"""Caching and packing on a distributed engine: Beam's runner for Dask, of whose workers one is killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import dask_cluster
from tests.data.conftest import write_corpus

pytest.importorskip("distributed", reason="needs the extra `dask`")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_worker_killed_in_the_middle_loses_nothing(vocabulary_file, tmp_path, plain_environment):
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        write_corpus(tmp_path / "corpus", 2000, number)
    command = [
        sys.executable,
        str(ROOT / "tools" / "cache_task.py"),
        "local_files",
        "--sequence_length=64",
        "--num_shards=8",
        f"--gin.local_files.pattern={tmp_path}/corpus/*.jsonl",
        f"--gin.vocabulary_path.path={vocabulary_file}",
    ]
    subprocess.run([*command, f"--cache_dir={tmp_path / 'local'}"], env=plain_environment, check=True)
    cache = tmp_path / "distributed"
    with dask_cluster.start(tmp_path, plain_environment) as (flags, workers):
        command += [*flags, f"--cache_dir={cache}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=plain_environment) as process:
            try:
                # The first of the files of one of two stages: there is work left for both workers.
                while not list(cache.rglob("*.tfrecord-*")):
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(0.005)
                workers[0].send_signal(signal.SIGKILL)
                _, errors = process.communicate()
            finally:
                process.kill()
        assert process.returncode == 0, errors
        assert workers[1].poll() is None and "Traceback" not in errors
    assert contents(cache) == contents(tmp_path / "local")
