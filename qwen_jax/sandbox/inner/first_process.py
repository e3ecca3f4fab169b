"""The first process of a run: it starts the steps, collects orphans, keeps the time, and takes everything along.

It is process 1 of the run's namespace of processes. When it ends, the kernel kills what is left there. Signals from
within the namespace do not reach it, since it handles none.
"""

import json
import os
import resource
import signal
import socket
import time

from . import kernel, python_program, remote, root

LOG = f"{root.TEMPORARY_FOLDER}/compiler.log"
_MEGABYTE = 1 << 20
_CHUNK = 1 << 16
_MOST_DESCRIPTORS = 4096


def main(descriptors: list[int], user: int, filter_program: bytes | None) -> None:
    """Runs what the first descriptor says, and never returns.

    Args:
      descriptors: the specification (JSON), standard input, output and error, the reports, and perhaps the test.
      user: whom the program runs as in the user namespace of the supervisor.
      filter_program: of system calls, or None for none.
    """
    specification, stdin, stdout, stderr, reports, *test = descriptors
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()
        os.umask(0o077)
        plan = json.loads(_read_all(specification))
        os.close(specification)
        root.enter_run(user, plan["disk_mb"], plan["proc"])
        if filter_program is not None:
            kernel.install_filter(filter_program)
        for name, text in plan["files"].items():
            _write_file(name, text)
        for place, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, place)
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for step in plan["steps"]:
            if not _run(step, plan, reports, test):
                break
    except BaseException as error:
        _report(reports, {"failed": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)


def _report(reports: int, content: dict) -> None:
    os.write(reports, json.dumps(content).encode() + b"\n")


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, _CHUNK):
        parts.append(part)
    return b"".join(parts)


def _write_file(name: str, text: str) -> None:
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.write(text)


def _run(step: dict, plan: dict, reports: int, test: list[int]) -> bool:
    """One step; reports how it ended, and returns whether the next may follow."""
    began = time.monotonic()
    pair = socket.socketpair() if test else None
    process = os.fork()
    if process == 0:
        _become(step, plan, pair[1] if pair else None)
    if pair is None:
        status = _wait(process, began + step["timeout_s"])
    else:
        # The test, whose author is known, runs in this process; the supervisor keeps its time.
        pair[1].close()
        status = remote.check(pair[0], _read_all(test[0]).decode("utf-8", "surrogatepass"), **step["check"]) << 8
    stopped = "timeout" if status is None else None
    wall_s = time.monotonic() - began
    _end_all()
    if step["log"] and status != 0:
        _show_log()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = used.ru_utime + used.ru_stime
    content = {"step": step["name"], "status": status, "stopped": stopped, "wall_s": wall_s, "cpu_s": processor_s}
    _report(reports, content)
    return status == 0


def _wait(process: int, deadline: float) -> int | None:
    """The status of a child of this process, or None at the deadline. Orphans of the run are collected meanwhile."""
    while True:
        while True:
            found, status = os.waitpid(-1, os.WNOHANG)
            if found == process:
                return status
            if found == 0:
                break
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        signal.sigtimedwait({signal.SIGCHLD}, left)


def _end_all() -> None:
    """Kills every other process of the run and waits for them."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)
        except (ProcessLookupError, ChildProcessError):
            return


def _show_log() -> None:
    with open(LOG, "rb") as file:
        while part := file.read(_CHUNK):
            os.write(2, part)


def _become(step: dict, plan: dict, connection: socket.socket | None) -> None:
    """Turns this process, a child of the first, into the program, or into a solution that a test asks over a socket."""
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _limit(step, plan["disk_mb"])
        if step["log"]:
            log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
        kept = 2 if connection is None else connection.fileno()
        os.closerange(3, kept)
        os.closerange(kept + 1, _MOST_DESCRIPTORS)
        if step["argv"]:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.execve(step["argv"][0], step["argv"], step["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if connection is None:
            python_program.run(step["file"], step["python_path"])
        else:
            remote.serve(connection, step["file"])
    except BaseException as error:
        os.write(2, f"cannot start {step['name']}: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def _limit(step: dict, disk_mb: int) -> None:
    processor_s = (int(step["timeout_s"]) + 2) * (os.cpu_count() or 1)  # threads may use every core
    memory = step["memory_mb"] * _MEGABYTE
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: processor_s,
        resource.RLIMIT_NPROC: step["processes"],
        resource.RLIMIT_NOFILE: step["open_files"],
        resource.RLIMIT_FSIZE: disk_mb * _MEGABYTE,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_AS if step["limit_addresses"] else resource.RLIMIT_DATA: memory,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))
