"""A Python interpreter that keeps its state between snippets: a Jupyter kernel in the sandbox (report 3.4).

The kernel is ipykernel's, started in a run of `qwen_jax.sandbox` with all of its limits. `kernel_bridge.py` runs
beside it and passes messages on over the run's pipes. Nothing that arrives here is trusted: the limits on time and on
output are kept on this side, and a kernel that breaks them is replaced by a new one.
"""

import atexit
import base64
import binascii
import dataclasses
import functools
import importlib.util
import json
import os
import select
import sys
import threading
import time
from pathlib import Path

from qwen_jax.sandbox import Plan, Process, Sandbox, SandboxUnavailableError, Step

# Imported once in the interpreter that kernels are forked off.
_MODULES = (
    *(
        "zmq",
        "tornado",
        "jupyter_client.session",
        "jupyter_client.connect",
        "ipykernel.kernelapp",
        "ipykernel.iostream",
    ),
    *("ipykernel.zmqshell", "ipykernel.ipkernel", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "numpy"),
    "IPython.core.pylabtools",
)
_FILE = "../tmp/kernel_bridge.py"  # relative to the working folder, which is the snippets'
_READ_BYTES = 1 << 16
_START_S = 300.0  # a few seconds; more than 60 were seen on a machine with four times as much work as cores
_LIFE_S = 24 * 3600.0  # the sandbox ends a run at some time; a kernel that nobody closed ends then
_ERROR_CHARACTERS = 2000
_KINDS = ("stdout", "stderr", "result", "display", "error", "image")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a kernel and of its snippets.

    Attributes:
      timeout_s: seconds of a snippet; then it is interrupted, and the state stays.
      grace_s: seconds that an interrupted snippet has to end; then its kernel is ended, and the state is lost.
      memory_mb: MiB of all processes together, of which the empty kernel takes about 180; also of each process.
      disk_mb: MiB of files.
      processes: number of processes and threads, of which the empty kernel takes 15.
      text: characters of text that are kept of a snippet.
      images: number of images that are kept of a snippet.
      image_bytes: bytes of images that are kept of a snippet.
    """

    timeout_s: float = 30.0
    grace_s: float = 5.0
    memory_mb: int = 2048
    disk_mb: int = 256
    processes: int = 96
    text: int = 1 << 16
    images: int = 16
    image_bytes: int = 8 << 20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: limits are positive")


@dataclasses.dataclass(frozen=True)
class Output:
    """One piece of output.

    Attributes:
      kind: "stdout", "stderr", "result" (value of the last expression), "display", "error" (a traceback) or "image".
      text: its text; "" for an image.
      image: a PNG or JPEG file, or None.
    """

    kind: str
    text: str = ""
    image: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a snippet did.

    Attributes:
      status: "ok"; "error": it raised; "timeout", "interrupted" or "output" (far too much of it): it was interrupted;
        "memory" or "died": its kernel ended.
      outputs: in the order in which the kernel sent them. Between standard output and error there is no true order.
      error: last line of the traceback, such as "NameError: name 'x' is not defined", or None.
      state_lost: whether the kernel is gone, with all variables and files; the next snippet gets a new one.
      cut: what is left out of `outputs`, in words, or "".
      background: text that threads and processes of earlier snippets wrote since the last snippet ended.
      wall_s: seconds.
    """

    status: str
    outputs: tuple[Output, ...] = ()
    error: str | None = None
    state_lost: bool = False
    cut: str = ""
    background: str = ""
    wall_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the snippet ran to its end without an error."""
        return self.status == "ok"

    @property
    def text(self) -> str:
        """All text but tracebacks, results and displays on lines of their own."""
        parts: list[str] = []
        for output in self.outputs:
            if output.kind in ("result", "display") and parts and not parts[-1].endswith("\n"):
                parts.append("\n")
            if output.kind not in ("error", "image"):
                parts.append(output.text + "\n" * (output.kind in ("result", "display")))
        return "".join(parts)

    @property
    def images(self) -> list[bytes]:
        """All images."""
        return [output.image for output in self.outputs if output.image is not None]


class Interpreter:
    """A Python kernel with a private folder and no network. `execute` runs snippets, one after the other.

    The kernel starts with the first snippet. Threads may share an interpreter: their snippets wait for each other.
    """

    def __init__(self, limits: Limits = Limits(), *, sandbox: Sandbox | None = None):
        """`sandbox` is one with the modules of a kernel; default: `kernel_sandbox()`."""
        self.limits = limits
        self._sandbox = sandbox
        self._turn = threading.Lock()  # one snippet at a time
        self._pipe = threading.Lock()  # one command at a time
        self._run: Process | None = None
        self._received = b""
        self._errors = b""
        self._running = self._interrupted = False

    def execute(self, code: str, *, timeout_s: float | None = None) -> Execution:
        """Runs a snippet and returns what it did; an error of the snippet is no exception here.

        Args:
          code: Python with IPython's magic commands.
          timeout_s: seconds, instead of the limit's.

        Raises:
          TypeError: the code is no text.
          ValueError: `timeout_s` is not positive, or without end.
          SandboxUnavailableError: this system cannot isolate a kernel, or it does not start.
        """
        if not isinstance(code, str):
            raise TypeError(f"code is {type(code).__name__}: expected text")
        timeout_s = self.limits.timeout_s if timeout_s is None else timeout_s
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}: give a positive number of seconds")
        with self._turn:
            began = time.monotonic()
            if self._run is None:
                self._start()
            limits = {name: getattr(self.limits, name) for name in ("text", "images", "image_bytes")}
            # Half of a character, as JSON may have it, cannot be sent to a kernel.
            code = code.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            until = time.monotonic() + timeout_s
            result = _Collected(self.limits)
            try:
                self._interrupted = False
                self._send({"code": code, "limits": limits}, until + self.limits.grace_s)
                self._running = True
                self._collect(result, until)
            except _Broken as broken:
                result.end(self._end(broken.reason))
            except BaseException:
                self._end("abandoned")
                raise
            finally:
                self._running = False
            return result.execution(time.monotonic() - began)

    def interrupt(self) -> None:
        """Interrupts the snippet that another thread runs; its state stays. Does nothing if there is none."""
        if self._running:
            self._interrupted = True
            try:
                self._send({"interrupt": True}, time.monotonic() + self.limits.grace_s)
            except _Broken:
                pass  # `execute` sees the end, too

    def restart(self) -> None:
        """Ends the kernel, with all variables, files and processes; the next snippet gets a new one."""
        with self._turn:
            self._end("restarted")

    def close(self) -> None:
        """As `restart`."""
        self.restart()

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the kernel now, if it does not run.

        Raises:
          SandboxUnavailableError: see `execute`.
        """
        with self._turn:
            if self._run is None:
                self._start()

    def _start(self) -> None:
        step = Step(
            "run",
            file=_FILE,
            timeout_s=_LIFE_S,
            memory_mb=self.limits.memory_mb,
            processes=self.limits.processes,
            open_files=1024,
            python_path=_folders(),
        )
        plan = Plan({_FILE: _bridge()}, [step], disk_mb=self.limits.disk_mb)
        self._received, self._errors = b"", b""
        self._run = (self._sandbox or kernel_sandbox()).start(plan, stdin=None)
        assert self._run.stdin is not None
        os.set_blocking(self._run.stdin, False)
        try:
            if "ready" not in self._next(time.monotonic() + _START_S):
                raise _Broken("its first message is no greeting")
        except (_Broken, TimeoutError) as broken:
            errors = self._errors
            reason = self._end(broken.reason if isinstance(broken, _Broken) else "timeout")
            said = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise SandboxUnavailableError(
                f"the kernel does not start ({reason}): {said or 'it says nothing'}"
            ) from None

    def _end(self, reason: str) -> str:
        """Ends the kernel; returns why it ended."""
        run, self._run = self._run, None
        if run is None:
            return reason
        with self._pipe:
            if reason != "died" or not _ends(run, self.limits.grace_s):
                run.kill(reason)
            try:
                ended = run.wait().stopped
            except SandboxUnavailableError:  # the sandbox itself was killed; the next start makes a new one
                ended = None
            finally:
                run.close()
        return "memory" if ended == "memory" else reason

    def _send(self, command: dict, deadline: float) -> None:
        data = memoryview(json.dumps(command).encode() + b"\n")
        with self._pipe:
            run = self._run
            if run is None or run.stdin is None:
                raise _Broken("died")
            poll = select.poll()
            poll.register(run.stdin, select.POLLOUT)
            while data:
                if not poll.poll(_milliseconds(deadline)):
                    raise _Broken("timeout")
                try:
                    data = data[os.write(run.stdin, data) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise _Broken("died") from None

    def _collect(self, result: "_Collected", until: float) -> None:
        """Takes messages until the snippet has ended.

        Raises:
          _Broken: the kernel has ended, or must be.
        """
        deadline = until
        while not result.done:
            try:
                result.take(self._next(deadline))
            except TimeoutError:
                if deadline != until:
                    raise _Broken("timeout") from None
                result.late = True
                deadline = time.monotonic() + self.limits.grace_s
                self._send({"interrupt": True}, deadline)
        result.interrupted = self._interrupted

    def _next(self, deadline: float) -> dict:
        """The next message of the bridge.

        Raises:
          TimeoutError: none came until the deadline.
          _Broken: the run has ended, or what came is no message.
        """
        run = self._run
        assert run is not None
        most = 2 * (self.limits.image_bytes + 8 * self.limits.text) + (1 << 20)
        poll = select.poll()
        for descriptor in (run.stdout, run.stderr):
            poll.register(descriptor, select.POLLIN)
        while b"\n" not in self._received:
            ready = poll.poll(_milliseconds(deadline))
            if not ready:
                raise TimeoutError
            for descriptor, _ in ready:
                part = os.read(descriptor, _READ_BYTES)
                if descriptor == run.stdout:
                    self._received += part
                    if not part:
                        raise _Broken("died")
                elif part:
                    self._errors = (self._errors + part)[-_ERROR_CHARACTERS:]
                else:
                    poll.unregister(descriptor)
            if len(self._received) > most:
                raise _Broken("output")
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or "died" in message:
            raise _Broken("died")
        return message


class _Broken(Exception):
    """The kernel has ended, or must be ended."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Collected:
    """The messages of one snippet."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.outputs: list[Output] = []
        self.done: dict = {}
        self.late = self.interrupted = False
        self.lost: str | None = None
        self._size = 0

    def take(self, message: dict) -> None:
        if "done" in message:
            self.done = message
            return
        kind, text, data = message.get("kind"), message.get("text", ""), message.get("data")
        self._size += len(str(text)) + len(str(data))
        if self._size > 2 * (self.limits.image_bytes + 8 * self.limits.text) + (1 << 20):
            raise _Broken("output")  # the bridge keeps the limits, unless a snippet has replaced it
        if kind not in _KINDS or not isinstance(text, str):
            raise _Broken("died")
        if kind == "image":
            try:
                self.outputs.append(Output("image", image=base64.b64decode(str(data), validate=True)))
            except binascii.Error:
                raise _Broken("died") from None
        elif self.outputs and self.outputs[-1].kind == kind and kind in ("stdout", "stderr"):
            self.outputs[-1] = Output(kind, self.outputs[-1].text + text)
        else:
            self.outputs.append(Output(kind, text))

    def end(self, reason: str) -> None:
        self.lost = reason if reason in ("memory", "output", "timeout") else "died"

    def execution(self, wall_s: float) -> Execution:
        error = self.done.get("error") or {}
        line = None
        if self.lost is None and self.done.get("done") != "ok":
            line = f"{error.get('ename', '')}: {error.get('evalue', '')}".strip(": ") or "unknown error"
        return Execution(
            status=self._status(),
            outputs=tuple(self.outputs),
            error=line,
            state_lost=self.lost is not None,
            cut=self._cut(),
            background=self._background(),
            wall_s=wall_s,
        )

    def _status(self) -> str:
        if self.lost:
            return self.lost
        if self.done.get("done") == "ok":
            return "ok"
        if self.done.get("flooded"):
            return "output"
        if self.late:
            return "timeout"
        return "interrupted" if self.interrupted else "error"

    def _cut(self) -> str:
        parts = [(self.done.get(f"{name}_cut"), unit) for name, unit in (("text", "characters"), ("images", "images"))]
        return " and ".join(f"{number:,} {unit}" for number, unit in parts if isinstance(number, int) and number)

    def _background(self) -> str:
        text, cut = str(self.done.get("background", "")), self.done.get("background_cut")
        return f"{text}… {cut:,} characters more" if isinstance(cut, int) and cut else text


def _ends(run: Process, seconds: float) -> bool:
    """Whether a run ends by itself within this time; then it says why."""
    poll, deadline = select.poll(), time.monotonic() + seconds
    poll.register(run.fileno(), select.POLLIN)
    while poll.poll(_milliseconds(deadline)):
        if not run.read_reports():
            return True
    return False


def _milliseconds(deadline: float) -> int:
    return max(0, int(1000 * (deadline - time.monotonic()) + 0.999))


@functools.cache
def _bridge() -> str:
    return Path(__file__).with_name("kernel_bridge.py").read_text()


@functools.cache
def _folders() -> list[str]:
    """Folders of the packages that a kernel needs, and of all other installed ones.

    Raises:
      ModuleNotFoundError: one is not installed.
    """
    found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]
    for name in ("ipykernel", "jupyter_client", "IPython", "zmq", "numpy", "matplotlib", "matplotlib_inline"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f'the code interpreter needs {name}, which is not installed: pip install "qwen_jax[agents]"'
            )
        folder = Path(spec.origin).parent
        found.append(str(folder.parent if spec.submodule_search_locations else folder))
    return list(dict.fromkeys(found))


@functools.cache
def kernel_sandbox() -> Sandbox:
    """The sandbox of all kernels of this process. Its programs see the installed Python packages and nothing else.

    Raises:
      ModuleNotFoundError: a package of the extra `agents` is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
    environment = {
        # The start of a kernel would build matplotlib's list of fonts, which takes seconds: this is the host's.
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or str(cache),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # One thread each: threads do not survive the fork, and many conversations share the cores.
        **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
    }
    made = Sandbox(modules=_MODULES, python_path=_folders(), environment=environment)
    atexit.register(made.close)
    return made
