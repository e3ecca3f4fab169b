"""Host side of the sandbox: starts its supervisor, hands it programs, and collects what they write."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

# Folders and files of the system that languages need. `/usr` holds the programs, the others what they are looked up in.
SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
# Loaded once in the interpreter that programs are forked off. Every other module makes every fork dearer.
MODULES = (
    *("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator", "re"),
    *("string", "typing"),
)
FOLDER = "/box/work"  # the working folder of every program
TEMPORARY_FOLDER = "/box/tmp"  # also /tmp
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": FOLDER, "TMPDIR": TEMPORARY_FOLDER, "LANG": "C.UTF-8"}
OPTIONAL = ("seccomp",)

_GRACE_S = 10.0  # after the limits of all steps: then the supervisor itself is late
_READ_BYTES = 1 << 16
# A program that writes this many times what is kept is stopped.
_FLOOD = 64


class SandboxUnavailableError(RuntimeError):
    """This system lacks something that isolates programs; the message says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a run, such as a compiler or the program.

    Attributes:
      name: name in the result.
      argv: command with the absolute path of its program, or None for `file`.
      file: Python file of the working folder, run in an interpreter that is already started.
      check: arguments of the check of the solution in `file` by `Plan.test`; see `programs.check`.
      timeout_s: seconds of wall time, after which all processes of the step are killed.
      memory_mb: MiB of all processes together, looked at every tenth of a second, and of each at any time.
      limit_addresses: whether each process's limit is on its whole address space, which language runtimes that reserve
        it in advance cannot keep; else on its private writable memory.
      processes: number of processes and threads.
      open_files: number of open files of each process.
      log: whether the output is kept only if the step fails (compilers), and then becomes standard error.
      environment: all of the environment.
      python_path: folders after those of the standard library, for `file`.
    """

    name: str
    argv: Sequence[str] | None = None
    file: str | None = None
    check: Mapping | None = None
    timeout_s: float = 10.0
    memory_mb: int = 1024
    limit_addresses: bool = False
    processes: int = 64
    open_files: int = 256
    log: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(ENVIRONMENT))
    python_path: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: files of the working folder, then the steps in order, until one fails.

    Attributes:
      files: text by name.
      steps: commands.
      disk_mb: MiB of all files, which lie in memory, and of each.
      proc: whether the run sees a /proc of its own processes.
      test: text of a test that only the checking process reads.
    """

    files: Mapping[str, str]
    steps: Sequence[Step]
    disk_mb: int = 64
    proc: bool = False
    test: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      exit_code: of the last step that ran, as `subprocess` has it (-9: signal 9), or None where it was stopped.
      stdout: standard output, UTF-8 with replacements, cut at the limit.
      stderr: standard error, likewise.
      stdout_cut: whether some of standard output is left out.
      stderr_cut: whether some of standard error is left out.
      stopped: why it was stopped ("timeout", "memory", "output"), or None.
      step: name of the last step that ran: "compile" or "run".
      wall_s: wall seconds of all steps.
      cpu_s: seconds of processor time of all processes.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    stdout_cut: bool
    stderr_cut: bool
    stopped: str | None
    step: str
    wall_s: float
    cpu_s: float

    @property
    def ok(self) -> bool:
        """Whether every step ended by itself with exit code 0."""
        return self.exit_code == 0


class Process:
    """A run that goes on: its pipes as descriptors, and `kill` and `wait`. Killed when it is closed.

    Attributes:
      stdout: descriptor to read from.
      stderr: descriptor to read from.
      stdin: descriptor to write to, or None where the run was given its input.
    """

    def __init__(self, stdin: int | None, stdout: int, stderr: int, reports: socket.socket, plan: Plan):
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self._reports = reports
        self._plan = plan
        self._content = b""
        self.killed: str | None = None

    def fileno(self) -> int:
        """Descriptor that is readable when the state changes; `read_reports` then says whether the run has ended."""
        return self._reports.fileno()

    def read_reports(self) -> bool:
        """Takes note of what the sandbox reports; False once the run has ended."""
        part = self._reports.recv(_READ_BYTES)
        self._content += part
        return bool(part)

    def kill(self, reason: str) -> None:
        """Kills all processes of the run; `wait` then gives `reason` as the reason."""
        self.killed = self.killed or reason
        with contextlib.suppress(OSError):  # it has ended
            self._reports.shutdown(socket.SHUT_WR)

    def wait(self) -> Result:
        """Waits for the end; the result has no output, which is the caller's to read.

        Raises:
          SandboxUnavailableError: the sandbox failed or was killed.
        """
        while self.read_reports():
            pass
        return self.result(b"", b"", False, False)

    def result(self, stdout: bytes, stderr: bytes, stdout_cut: bool, stderr_cut: bool) -> Result:
        """The result of a run that has ended, with its output."""
        reports = [json.loads(line) for line in self._content.splitlines()]
        failed = [report["failed"] for report in reports if "failed" in report]
        if failed:
            raise SandboxUnavailableError(f"the sandbox could not start the program: {failed[0]}")
        ended = [report for report in reports if "ended" in report]
        if not ended:
            raise SandboxUnavailableError("the sandbox was killed during the run; run it again")
        steps = [report for report in reports if "step" in report]
        last = steps[-1] if steps else None
        killed = [report["killed"] for report in reports if report.get("killed", "abandoned") != "abandoned"]
        stopped = self.killed or (killed[0] if killed else None) or (last["stopped"] if last else None)
        if stopped is None and last is None:
            stopped = "killed"
        status = last["status"] if last and stopped is None else None
        return Result(
            exit_code=None if status is None else os.waitstatus_to_exitcode(status),
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            stdout_cut=stdout_cut,
            stderr_cut=stderr_cut,
            stopped=stopped,
            step=self._plan.steps[min(len(steps), len(self._plan.steps) - 1)].name if not last else last["step"],
            wall_s=sum(report["wall_s"] for report in steps) or ended[0]["wall_s"],
            cpu_s=ended[0]["cpu_s"],
        )

    def close(self) -> None:
        """Kills what still runs, and closes the pipes."""
        for descriptor in (self.stdin, self.stdout, self.stderr):
            if descriptor is not None:
                os.close(descriptor)
        self.stdin = None
        self._reports.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandbox:
    """A supervisor and the file system that its programs see. Threads may share one, and run many programs at once.

    Args:
      mounts: further absolute paths of the host that programs may read, under the same names.
      modules: modules to have loaded, of the standard library or of `python_path`. They are imported outside of the
        isolation, and must start no thread.
      python_path: folders in which `modules` are found besides the standard library; programs may read them. A step
        that imports more from them names them, too.
      environment: variables of Python programs (`Step.file`) besides `ENVIRONMENT`.
      allow_missing: parts of the isolation to go on without where this system lacks them, of `OPTIONAL`; a warning
        is logged. Namespaces are never optional.

    Raises:
      ValueError: a mount is no absolute path of something there, or an unknown part is allowed to be missing.
    """

    def __init__(
        self,
        mounts: Iterable[str | os.PathLike] = (),
        *,
        modules: Sequence[str] = MODULES,
        python_path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        allow_missing: Iterable[str] = (),
    ):
        self._allow_missing = frozenset(allow_missing)
        if unknown := self._allow_missing - set(OPTIONAL):
            raise ValueError(f"allow_missing: {', '.join(sorted(unknown))}: only {', '.join(OPTIONAL)} may be missing")
        given = [os.fspath(path) for path in (*mounts, *python_path)]
        for path in given:
            if not os.path.isabs(path) or not os.path.exists(path):
                raise ValueError(f"mounts: {path}: expected the absolute path of a folder or file that is there")
        present = [path for path in SYSTEM if os.path.lexists(path)]
        self._mounts = [*present, os.path.realpath(sys.base_prefix), sys.base_prefix, *given]
        self._modules = modules
        self._python_path = list(python_path)
        self._environment = {**ENVIRONMENT, **(environment or {})}
        self._lock = threading.Lock()
        self._supervisor: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    def start(self, plan: Plan, *, stdin: str | None = "") -> Process:
        """Starts a run.

        Args:
          stdin: all of standard input, or None for a pipe, `Process.stdin`.

        Raises:
          SandboxUnavailableError: this system cannot isolate it.
        """
        steps = [dataclasses.asdict(step) for step in plan.steps]
        content = {"files": dict(plan.files), "steps": steps, "disk_mb": plan.disk_mb, "proc": plan.proc}
        ours: list[int] = []
        theirs = [_sealed(json.dumps(content).encode())]
        reports, their_reports = socket.socketpair()
        try:
            if stdin is None:
                read, write = os.pipe2(os.O_CLOEXEC)
                ours, theirs = [write], [*theirs, read]
            else:
                theirs.append(_sealed(stdin.encode("utf-8", "surrogatepass")))
            for _ in range(2):
                read, write = os.pipe2(os.O_CLOEXEC)
                ours, theirs = [*ours, read], [*theirs, write]
            theirs.append(their_reports.detach())
            if plan.test is not None:
                theirs.append(_sealed(plan.test.encode("utf-8", "surrogatepass")))
            own_timekeeper = plan.test is None  # the first process of the run, step by step
            timeout_s = sum(step.timeout_s for step in plan.steps) + (_GRACE_S if own_timekeeper else 0.0)
            header = {"memory_mb": max(step.memory_mb for step in plan.steps), "timeout_s": timeout_s}
            self._send(json.dumps(header).encode(), theirs)
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            reports.close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        pipe = ours.pop(0) if stdin is None else None
        return Process(pipe, *ours, reports, plan)

    def run(self, plan: Plan, *, stdin: str = "", output_bytes: int = 1 << 18) -> Result:
        """Runs a plan to its end.

        Args:
          stdin: all of standard input.
          output_bytes: how much of standard output, and of standard error, is kept; a program that writes 64 times as
            much is stopped.

        Raises:
          SandboxUnavailableError: this system cannot isolate it, or the sandbox was killed.
        """
        with self.start(plan, stdin=stdin) as process:
            return _collect(process, output_bytes, sum(step.timeout_s for step in plan.steps) + 2 * _GRACE_S)

    def close(self) -> None:
        """Ends the supervisor, and every run with it."""
        with self._lock:
            self._end()

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        with self._lock:
            for _ in range(2):
                if self._control is None:
                    self._begin()
                try:
                    assert self._control is not None
                    socket.send_fds(self._control, [message], descriptors)
                    return
                except OSError:
                    self._end()  # it was killed: a new one takes its place
        raise SandboxUnavailableError("the sandbox's supervisor ends as soon as it is started")

    def _begin(self) -> None:
        missing = self._try("seccomp" in self._allow_missing)
        if missing is None:
            return
        raise SandboxUnavailableError(
            f"this system cannot isolate programs: {missing}. User namespaces must be allowed for this user "
            "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0, or in a container the "
            "right to make them), on Linux 5.12 or newer"
        )

    def _try(self, filter_is_optional: bool) -> str | None:
        missing = self._launch(with_filter=True)
        if missing and filter_is_optional and "filter of system calls" in missing:
            log.warning("sandbox: programs run WITHOUT a filter of system calls, as allowed: %s", missing)
            missing = self._launch(with_filter=False)
        return missing

    def _launch(self, with_filter: bool) -> str | None:
        """Starts a supervisor; returns what this system lacks, or None."""
        if sys.platform != "linux":
            return f"{sys.platform} has no namespaces"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = str(Path(__file__).parent)
        program = (
            f"import sys; sys.path.insert(0, {folder!r}); from inner import supervisor; del sys.path[0]; "
            "supervisor.start(int(sys.argv.pop()))"
        )
        python = getattr(sys, "_base_executable", None) or sys.executable
        command = [os.path.realpath(python), "-I", "-S", "-B", "-c", program, str(theirs.fileno())]
        with tempfile.TemporaryFile() as errors, theirs:
            self._supervisor = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                start_new_session=True,
                cwd="/",
            )
            theirs.close()
            setup = {
                "mounts": self._mounts,
                "modules": list(self._modules),
                "python_path": self._python_path,
                "seccomp": with_filter,
            }
            try:
                ours.send(json.dumps(setup).encode())
                answer = json.loads(ours.recv(_READ_BYTES) or b'{"missing": ""}')
            except OSError as error:
                answer = {"missing": str(error)}
            if "missing" in answer:
                ours.close()
                self._supervisor.wait()
                errors.seek(0)
                return answer["missing"] or errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        self._control = ours
        return None

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._supervisor is not None:
            try:
                self._supervisor.wait(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
            self._supervisor = None


def _sealed(content: bytes) -> int:
    """A file in memory with this content, which nobody can change."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _collect(process: Process, output_bytes: int, limit_s: float) -> Result:
    """Reads what a run writes, and throws away what is too much, until it ends."""
    deadline = time.monotonic() + limit_s
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    seen = dict.fromkeys(kept, 0)
    poll = select.poll()
    for descriptor in (*kept, process.fileno()):
        poll.register(descriptor, select.POLLIN)
    open_descriptors = {*kept, process.fileno()}
    while open_descriptors:
        for descriptor, _ in poll.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            if descriptor == process.fileno():
                goes_on = process.read_reports()
            else:
                part = os.read(descriptor, _READ_BYTES)
                goes_on = bool(part)
                room = output_bytes - len(kept[descriptor])
                kept[descriptor] += part[: max(0, room)]
                seen[descriptor] += len(part)
                if seen[descriptor] > _FLOOD * output_bytes and process.killed is None:
                    process.kill("output")
            if not goes_on:
                poll.unregister(descriptor)
                open_descriptors.discard(descriptor)
        if time.monotonic() > deadline:
            if process.killed:
                raise SandboxUnavailableError("the sandbox does not end the run; close it")
            process.kill("timeout")
            deadline = time.monotonic() + _GRACE_S  # this process may have been suspended in between
    out, err = process.stdout, process.stderr
    return process.result(bytes(kept[out]), bytes(kept[err]), seen[out] > output_bytes, seen[err] > output_bytes)
