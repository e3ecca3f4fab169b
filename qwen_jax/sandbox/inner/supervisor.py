"""The process that starts runs: an interpreter in namespaces of its own, forked once for each run.

It is the first process of its namespace of processes, so everything that it started ends with it, and it ends when the
host's end of its socket closes. It never reads what a run executes: each run reads that itself, from a descriptor.
"""

import gc
import json
import math
import os
import select
import signal
import socket
import sys
import time

from . import first_process, kernel, root, seccomp

_CHECK_EVERY_S = 0.1
_MESSAGE = 1 << 16
_DESCRIPTORS = 8
_FIELDS = (b"PPid:", b"RssAnon:", b"RssShmem:")  # of /proc/PID/status


def start(control_descriptor: int) -> None:
    """Sets the sandbox up as the first message says, answers with what is missing (or nothing), and serves runs."""
    control = socket.socket(fileno=control_descriptor)
    setup = json.loads(control.recv(_MESSAGE))
    folders = setup["python_path"]
    sys.path += folders
    for module in setup["modules"]:
        __import__(module)
    del sys.path[len(sys.path) - len(folders) :]  # programs see them only where their step says so
    import site

    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()
    try:
        filter_program = seccomp.program() if setup["seccomp"] else None
        user = root.enter_user_namespace()
        kernel.unshare(kernel.NAMESPACES | kernel.CLONE_NEWPID)
        process = os.fork()
        if process:
            control.close()
            os.waitpid(process, 0)
            os._exit(0)
        kernel.die_with_parent(signal.SIGKILL)
        root.enter(setup["mounts"])
        if filter_program is not None:
            _try_filter(filter_program)
    except OSError as error:
        control.send(json.dumps({"missing": str(error)}).encode())
        os._exit(1)
    control.send(b"{}")
    _Supervisor(control, user, filter_program).serve()


def _try_filter(program: bytes) -> None:
    """Installs the filter in a process of its own.

    Raises:
      OSError: the kernel does not take it.
    """
    process = os.fork()
    if process == 0:
        try:
            kernel.forbid_new_privileges()
            kernel.install_filter(program)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    _, status = os.waitpid(process, 0)
    if status:
        raise OSError(os.waitstatus_to_exitcode(status), "the kernel takes no filter of system calls")


class _Run:
    """A run: its first process, the socket on which it reports, and its limits."""

    def __init__(self, process: int, reports: socket.socket, limits: dict):
        self.process = process
        self.reports = reports
        self.memory_bytes: float = limits["memory_mb"] << 20
        self.began = time.monotonic()
        self.deadline = self.began + limits["timeout_s"]

    def kill(self, reason: str) -> None:
        self.tell({"killed": reason})
        os.kill(self.process, signal.SIGKILL)
        self.deadline = self.memory_bytes = math.inf  # once is enough

    def tell(self, content: dict) -> None:
        try:
            self.reports.send(json.dumps(content).encode() + b"\n")
        except OSError:
            pass  # the host does not wait for it any more


class _Supervisor:
    def __init__(self, control: socket.socket, user: int, filter_program: bytes | None):
        self._control = control
        self._user = user
        self._filter = filter_program
        self._own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._runs: dict[int, _Run] = {}  # by descriptor of the socket on which they report
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._next_check = 0.0

    def serve(self) -> None:
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(wake, select.POLLIN)
        gc.collect()
        gc.freeze()  # what is shared by all runs stays shared: a collection in one of them does not write to it
        while True:
            for descriptor, _ in self._poll.poll(self._patience_ms()):
                if descriptor == wake:
                    os.read(wake, 512)
                elif descriptor == self._control.fileno():
                    self._accept()
                elif descriptor in self._runs:
                    self._runs[descriptor].kill("abandoned")
                    self._poll.unregister(descriptor)
            self._collect()
            self._watch()

    def _accept(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE, _DESCRIPTORS)
        if not message:
            os._exit(0)  # the host has ended, and every run with this process
        reports = socket.socket(fileno=descriptors.pop(4))
        try:
            process = self._fork([*descriptors[:4], reports.fileno(), *descriptors[4:]])
        except OSError as error:  # too many processes, or no memory
            reports.send(json.dumps({"failed": str(error)}).encode() + b"\n")
            reports.close()
        else:
            self._runs[reports.fileno()] = _Run(process, reports, json.loads(message))
            self._poll.register(reports, select.POLLIN)  # readable once the host has closed its end
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self, descriptors: list[int]) -> int:
        """Starts the first process of a run, in a namespace of processes of its own."""
        kernel.unshare(kernel.CLONE_NEWPID)
        try:
            process = os.fork()
            if process == 0:
                self._become(descriptors)
        finally:
            kernel.set_namespace(self._own_namespace, kernel.CLONE_NEWPID)
        return process

    def _become(self, descriptors: list[int]) -> None:
        """Makes this process the first of a run, with nothing of other runs."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kept, last = set(descriptors), max(descriptors)
            for descriptor in range(3, last):
                if descriptor not in kept:
                    _close(descriptor)
            os.closerange(last + 1, 4096)
            user, filter_program = self._user, self._filter
            first_process.main(descriptors, user, filter_program)
        finally:
            os._exit(1)

    def _collect(self) -> None:
        """Takes note of runs that have ended."""
        while self._runs:
            try:
                process, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            for descriptor, run in self._runs.items():
                if run.process == process:
                    cpu_s = used.ru_utime + used.ru_stime
                    run.tell({"ended": status, "cpu_s": cpu_s, "wall_s": time.monotonic() - run.began})
                    self._forget(descriptor)
                    break

    def _forget(self, descriptor: int) -> None:
        try:
            self._poll.unregister(descriptor)
        except KeyError:
            pass  # abandoned before
        self._runs.pop(descriptor).reports.close()

    def _patience_ms(self) -> int | None:
        """How long to wait for news: until the next look at the memory of runs, or the first deadline."""
        if not self._runs:
            return None
        until = min(time.monotonic() + _CHECK_EVERY_S, *(run.deadline for run in self._runs.values()))
        return max(0, math.ceil(1000 * (until - time.monotonic())))

    def _watch(self) -> None:
        """Kills runs that have taken too long, or whose processes hold more memory together than they may."""
        now = time.monotonic()
        for run in self._runs.values():
            if now > run.deadline:
                run.kill("timeout")
        if not self._runs or now < self._next_check:
            return
        self._next_check = now + _CHECK_EVERY_S
        old = [run for run in self._runs.values() if now - run.began > _CHECK_EVERY_S]
        if not old:
            return
        parents, resident = _processes()
        totals: dict[int, int] = {}
        for process in parents:
            ancestor = process
            while parents.get(ancestor, 1) not in (0, 1):
                ancestor = parents[ancestor]
            totals[ancestor] = totals.get(ancestor, 0) + resident[process]
        for run in old:
            if totals.get(run.process, 0) > run.memory_bytes:
                run.kill("memory")


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        pass


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """Parents, and bytes of memory that no file backs, of all processes of the sandbox."""
    parents, resident = {}, {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as file:
                fields = dict(line.split(b":", 1) for line in file if line.startswith(_FIELDS))
        except OSError:
            continue  # it has ended
        parents[int(name)] = int(fields[b"PPid"])
        resident[int(name)] = sum(int(size.split()[0]) << 10 for key, size in fields.items() if key != b"PPid")
    return parents, resident
