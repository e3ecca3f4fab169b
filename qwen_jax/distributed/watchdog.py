"""Detects a run without progress: a process that died, a host that hangs, a step that does not end.

Two threads run beside the loop of every process. One exchanges signs of life through the job's store: each process
writes its own and reads one verdict, and process 0 alone looks at all of them. The other only watches clocks, so that a
call into the network that never returns is detected too. Either ends the process with an error that names the missing
process or operation; the state since the last checkpoint is lost, and the same command resumes from there.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import jax

from qwen_jax import files
from qwen_jax.command_line import one_line
from qwen_jax.distributed import hosts

log = logging.getLogger(__name__)

# Given to the clocks beside the loop before the C timer, which needs no interpreter, ends the process.
_GRACE_SECONDS = 30.0
# Its file descriptor: `sys.stderr` may be a notebook's, which has none.
_STANDARD_ERROR = 2


@dataclasses.dataclass
class Activity:
    """Current activity of the loop; every change of it is a sign of progress.

    Attributes:
      what: name of the activity in errors.
      step: updates made.
      together: whether it ends only when all processes have reached it.
      limited: False for an activity that may take hours, such as caching a corpus.
      patience: how many times the limit it may take.
    """

    what: str = "starting"
    step: int = 0
    together: bool = False
    limited: bool = False
    patience: float = 1.0
    since: float = dataclasses.field(default_factory=time.monotonic)

    def now(
        self,
        what: str,
        step: int | None = None,
        *,
        together: bool = False,
        limited: bool = True,
        patience: float = 1.0,
    ) -> None:
        """Records the begin of a new activity."""
        self.since = time.monotonic()  # first: the limit of this activity does not hold for the time of the one before
        self.what, self.together, self.limited, self.patience = what, together, limited, patience
        self.step = self.step if step is None else step


def dump_stacks(folder: Path | None, process: int) -> str:
    """Writes the stacks of all threads to standard error and into the run's folder; returns the place."""
    sys.stderr.flush()
    faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
    if folder is None:
        return "standard error"
    path = folder / f"stacks_{process}.txt"
    try:
        if not folder.is_dir():
            return "standard error"
        with files.new_file(path) as temporary, open(temporary, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
    except OSError as error:  # a full disk, or the network that the process hangs for: it must end all the same
        return f"standard error ({path} could not be written: {one_line(error)})"
    return str(path)


def exit_process(message: str, code: int) -> None:
    """Ends this process at once, with one line on standard error: the main thread may wait forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\nerror: {' '.join(message.split())}\n".encode())
    os._exit(code)


@contextlib.contextmanager
def join_job(config: hosts.JobConfig, configuration: str) -> Generator["Watchdog"]:
    """Joins the job, compares all its processes, and watches them while open.

    Raises:
      ValueError, TimeoutError: as `hosts.connect` and `hosts.handshake`.
    """
    # JAX gives up by aborting the process from C++, so no exception of it could be caught.
    alarm = threading.Timer(config.join_timeout, _nobody_came, [config])
    alarm.daemon = True
    alarm.start()
    try:
        hosts.connect(config)
    finally:
        alarm.cancel()
    with Watchdog(config, hosts.handshake(configuration, config.join_timeout)) as watchdog:
        yield watchdog


def _nobody_came(config: hosts.JobConfig):
    """Ends a process whose job did not form in time, and names the missing process as far as it is known."""
    address = config.coordinator_address or hosts.coordinator_address()
    if address and not _reachable(address):
        missing = f"process 0 cannot be reached at {address}"
    else:
        missing = f"at least one of {config.num_processes or 'the'} processes has not joined" + (
            f" at {address}" if address else ""
        )
    exit_process(
        f"{missing} after {config.join_timeout:g} s (--join_timeout). Is the same command running on every host, and "
        f"the address of process 0 open to all?",
        hosts.TRY_AGAIN,
    )


def _reachable(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class Watchdog:
    """Watches one process and its job while open.

    Attributes:
      activity: current activity of the loop, which the loop updates.
    """

    def __init__(
        self,
        config: hosts.JobConfig = hosts.JobConfig(),
        facts: dict[int, dict] | None = None,
        folder: Path | None = None,
    ):
        """Prepares to watch.

        Args:
          facts: result of `hosts.handshake`.
          folder: where the stacks of a process that hangs are written.
        """
        self.activity, self.folder = Activity(), folder
        self._config, self._facts, self._limit = config, facts or {}, config.hang_timeout
        self._process, self._processes = hosts.process_index(), hosts.process_count()
        self._closed = threading.Event()
        self._contact = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._threads: list[threading.Thread] = []
        self._told = False

    def __enter__(self):
        if self._processes > 1:
            self._speak_when_the_service_dies()
            self._threads.append(threading.Thread(target=self._talk, name="signs of life", daemon=True))
        if self._processes > 1 or self._limit:
            self._threads.append(threading.Thread(target=self._watch_clocks, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, _):
        if error is not None and self._processes > 1 and not isinstance(error, SystemExit):
            self._tell_the_others(error)
        self._closed.set()
        for thread in self._threads:
            thread.join()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()
        if self._processes > 1 and error is None:
            hosts.put(f"alive/{self._process}", {"beat": -1})

    # Clocks.

    def _watch_clocks(self):
        interval = min(self._config.poll_seconds, self._limit / 4 or hosts.POLL_SECONDS)
        while not self._closed.wait(interval):
            if self._limit:
                # Fires only if this loop no longer runs: some thread keeps the interpreter to itself.
                faulthandler.dump_traceback_later(self._limit + _GRACE_SECONDS, exit=True, file=_STANDARD_ERROR)
            limit = self._limit * self.activity.patience if self.activity.limited else 0
            now = time.monotonic()
            seconds = now - self.activity.since  # read last, and set first by the next activity
            if limit and seconds > limit:
                self._hung(seconds)
            if self._processes > 1 and now - self._contact > self._config.heartbeat_timeout + 2 * interval:
                exit_process(f"{self._name(0)} has not answered for {now - self._contact:.0f} s", hosts.TRY_AGAIN)

    def _hung(self, seconds: float):
        place = dump_stacks(self.folder, self._process)
        text = (
            f"no progress for {seconds:.0f} s (--hang_timeout={self._limit:g}) while {self.activity.what} after step "
            f"{self.activity.step}; the stacks of its threads are in {place}"
        )
        if self._processes > 1:
            said = {"error": f"{self._name(self._process)}: {text}", "code": hosts.TRY_AGAIN, "hang": True}
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store may be what hangs
                hosts.put(f"ended/{self._process}", said)
            # The verdict that comes back says which process the others wait for.
            self._closed.wait(4 * self._config.poll_seconds)
        exit_process(text if self._processes == 1 else f"{self._name(self._process)}: {text}", hosts.TRY_AGAIN)

    # Signs of life.

    def _talk(self):
        beat = 0
        while True:
            beat += 1
            try:
                done = self._talk_once(beat)
            except jax.errors.JaxRuntimeError as error:
                log.debug("the job's store: %s", error)
                done = False
            else:
                self._contact = time.monotonic()
            if self._closed.wait(self._config.poll_seconds) or done:
                return

    def _talk_once(self, beat: int) -> bool:
        activity = self.activity
        hosts.put(
            f"alive/{self._process}",
            {
                "beat": beat,
                "what": activity.what,
                "step": activity.step,
                "together": activity.together,
                "seconds": time.monotonic() - activity.since,
            },
        )
        verdict = self._judge() if self._process == 0 else hosts.peek("verdict")
        if verdict is None or self._told:
            return False
        if verdict.get("hang"):
            dump_stacks(self.folder, self._process)
        self._told = True
        self._pass_on(verdict)
        exit_process(verdict["error"], verdict["code"])
        return True

    def _pass_on(self, verdict: dict):
        hosts.put(f"ended/{self._process}", verdict)
        if self._process == 0:
            hosts.put("verdict", verdict)
        hosts.let_all_read("read", 2 * self._config.poll_seconds + 0.5)

    def _judge(self) -> dict | None:
        alive, ended = hosts.peek_all("alive"), hosts.peek_all("ended")
        for _, said in sorted(ended.items()):
            why = self._suspects(alive) if said.get("hang") else ""
            return said | {"error": said["error"] + why}
        now = time.monotonic()
        for process in range(1, self._processes):
            beat = alive.get(process, {}).get("beat", 0)
            if self._seen.setdefault(process, (beat, now))[0] != beat:
                self._seen[process] = (beat, now)
            silent = now - self._seen[process][1]
            if beat >= 0 and silent > self._config.heartbeat_timeout:
                last = alive.get(process, {"what": "starting", "step": 0})
                return {
                    "code": hosts.TRY_AGAIN,
                    "error": f"{self._name(process)} gave no sign of life for {silent:.0f} s; it was last "
                    f"{last['what']} after step {last['step']}. Was it killed, or did its host go down? "
                    f"The same command goes on from the last checkpoint",
                }
        return None

    def _suspects(self, alive: dict[int, dict]) -> str:
        """Text for errors: the processes that the others wait for."""
        running = {process: said for process, said in alive.items() if said["beat"] >= 0}
        least = min(said["step"] for said in running.values())
        suspects = {p: said for p, said in running.items() if not said["together"]} or {
            p: said for p, said in running.items() if said["step"] == least
        }
        if len(suspects) == len(running) and len(running) > 1:
            return "; all processes wait for each other: a device, or the network between them"
        shown = [
            f"{self._name(p)}, {said['what']} after step {said['step']} for {said['seconds']:.0f} s"
            for p, said in sorted(suspects.items())[:3]
        ]
        return f"; the others wait for {'; '.join(shown)}"

    def _name(self, process: int) -> str:
        facts = self._facts.get(process)
        return hosts.name_of(process, facts) if facts else f"process {process}"

    def _tell_the_others(self, error: BaseException):
        """Tells the others why this process ends, unless it ends because of another."""
        text = one_line(error)
        if _came_from_others(error):
            print(f"process {self._process}: {text[:300]}; looking for the process that is missing", file=sys.stderr)
            self._closed.wait(self._config.heartbeat_timeout + 4 * self._config.poll_seconds)
        self._told = True
        code = 2 if isinstance(error, (ValueError, OSError, ArithmeticError)) else 1
        try:
            self._pass_on({"error": f"{self._name(self._process)}: {text}", "code": code})
        except jax.errors.JaxRuntimeError as unreachable:
            log.warning("the other processes could not be told: %s", unreachable)

    def _speak_when_the_service_dies(self):
        """Names process 0 when JAX aborts this process because its coordination service is gone.

        JAX does that within milliseconds, from a thread of its own and with no hook to add a message.
        """
        address, name = hosts.coordinator_address(), self._name(0)
        if self._process == 0 or address is None:
            return

        def aborting(number):
            if not _reachable(address):
                exit_process(
                    f"{name}, where the job's coordination service ran at {address}, cannot be reached: was it killed, "
                    f"or did its host go down? The same command goes on from the last checkpoint",
                    hosts.TRY_AGAIN,
                )

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborting)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(self._handler)], ctypes.c_void_p
        libc.signal(signal.SIGABRT, self._handler)


def _came_from_others(error: BaseException) -> bool:
    """Whether an error may be the end of another process, seen from here."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" not in text and (
        isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in text or "UNAVAILABLE" in text
    )
