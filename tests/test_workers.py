"""Pieces of work by processes of this machine and by Beam: all are done, and what goes wrong is said in one line."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax import files
from qwen_jax.workers import open_workers

BEAM = ["--runner=FnApiRunner"]


def write(folder: Path, number: int, text: str) -> None:
    files.write_text(folder / f"{number}.txt", f"{text} {os.getpid()}")


def write_setting(path: Path, name: str) -> None:
    files.write_text(path, os.environ[name])


def fail(number: int) -> None:
    raise OSError(f"piece {number}: no space left on device")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(fifo: Path) -> None:
    with fifo.open("w") as file:
        file.write("begun\n")
        file.flush()
        time.sleep(3600)


def never(pieces) -> list[bool]:
    return [False for _ in pieces]


def are_there(pieces) -> list[bool]:
    return files.are_files([path for path, _ in pieces])


@pytest.fixture(scope="module")
def two():
    with open_workers(2) as workers:
        yield workers


@pytest.mark.parametrize("how", ["here", "processes", "beam"])
def test_all_pieces_are_done_by_the_workers_that_were_asked_for(how, tmp_path, two):
    def done(pieces):
        return files.are_files([tmp_path / f"{number}.txt" for number, _ in pieces])

    def run(workers):
        pieces = [(number, "piece") for number in range(5)]
        workers("writing", functools.partial(write, tmp_path), pieces, done)
        workers("nothing", fail, [], never)
        # A stage of the same name does what it is told, not what the first one was.
        workers("writing", files.write_text, [(tmp_path / "a.txt", "a")], are_there)

    if how == "processes":
        run(two)
    else:
        with open_workers(1, BEAM if how == "beam" else []) as workers:
            run(workers)
    texts = [(tmp_path / f"{number}.txt").read_text().split() for number in range(5)]
    assert [text for text, _ in texts] == ["piece"] * 5
    processes = {int(process) for _, process in texts}
    assert (os.getpid() in processes) == (how != "processes") and len(processes) <= 2


def test_workers_have_the_environment_of_their_own_launch(tmp_path, two, monkeypatch):
    """Not that of the first workers of this process, from whose server they are forked."""
    two("writing", files.write_text, [(tmp_path / "a", "a")], are_there)
    monkeypatch.setenv("SET_LATER", "here")
    with open_workers(2) as workers:
        path = tmp_path / "b"
        workers("writing", write_setting, [(path, "SET_LATER")], are_there)
    assert path.read_text() == "here"


@pytest.mark.parametrize("how", ["here", "processes", "beam"])
def test_an_error_in_a_piece_is_the_users(how, two):
    with pytest.raises((OSError, ValueError), match="piece 0: no space left"):
        if how == "processes":
            two("failing", fail, [(0,)], never)
        else:
            with open_workers(1, BEAM if how == "beam" else []) as workers:
                workers("failing", fail, [(0,)], never)


WAITING = """
import sys, time
from pathlib import Path
from qwen_jax import command_line, files, workers

def wait(folder, number):
    with files.new_file(folder / "unfinished") as temporary:
        temporary.touch()
        (folder / f"{number}.begun").touch()
        while number:  # one worker has nothing to do any more
            time.sleep(0.01)

def main():
    with workers.open_workers(3) as run:
        run("waiting", wait, [(Path(sys.argv[1]), number) for number in range(3)], lambda pieces: [])

if __name__ == "__main__":
    command_line.run(main)
"""


def test_ctrl_c_ends_workers_without_a_traceback(tmp_path, plain_environment):
    (tmp_path / "waiting.py").write_text(WAITING)
    environment = plain_environment | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while len(list(tmp_path.glob("*.begun"))) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and said.strip() == "interrupted", said
    assert not list(tmp_path.glob("*.tmp"))


def test_a_killed_worker_is_one_line(tmp_path):
    with open_workers(2) as workers:
        with pytest.raises(ValueError, match="dying: a worker process was killed, .* the same command goes on"):
            workers("dying", die, [()], never)


def test_output_that_is_missing_without_an_error_stops_the_run():
    with open_workers() as workers:
        with pytest.raises(RuntimeError, match="the output of 1 of 1 pieces is missing"):
            workers("losing", str, [("a",)], never)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path, root):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = (
        "from tests.test_workers import *\n"
        f"with open_workers(2) as workers: workers('holding', hold, [(Path({str(fifo)!r}),)], never)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=root) as launcher, fifo.open() as file:
        assert file.readline() == "begun\n"
        launcher.kill()
        assert file.read() == ""  # the end comes when no process holds the other side


@pytest.mark.parametrize(
    ("num_workers", "options", "message"),
    [
        (0, [], "0 workers"),
        (2, BEAM, "give one of the two"),
        (1, ["--direct_num_workers=2"], "none is named: give --beam.runner=NAME"),
        (1, ["--runner=FnApiRunner", "--direct_num_worker=2"], "Did you mean --direct_num_workers"),
    ],
)
def test_workers_that_cannot_be_meant_are_refused(num_workers, options, message):
    with pytest.raises(ValueError, match=message), open_workers(num_workers, options):
        pass
