"""Sides of a comparison as processes that take turns: each measures its own work and answers through a pipe.

A side's process imports this file and what it measures alone, so it may run in an environment without our packages.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class WorkerEnded(ValueError):
    """The process of a side has ended before it answered; it has written why."""


class Worker:
    """A side's end of the pipe: reads numbers of units of work, and answers with their seconds and what was recorded.

    An answer has "seconds" of wall time, "cpu" seconds over all threads, "peak_bytes" (the most resident memory since
    the order came; None where the system does not tell), and a list of floats for each recorded name.
    """

    def __init__(self, job: dict, **about):
        """Tells that the side is ready; `about` describes it, and becomes `Side.about`."""
        self._answers = os.fdopen(job["answers"], "w")
        self._recorded: dict[str, list[float]] = {}
        self._say(about)

    def _say(self, what: dict) -> None:
        print(json.dumps(what), file=self._answers, flush=True)

    def units(self) -> Iterator[None]:
        """Yields before each unit of work that is wanted; what lies between an order and its last unit is measured."""
        for line in sys.stdin:
            self._recorded = {}
            forget_peak_memory()
            began, cpu = time.perf_counter(), time.process_time()
            yield from [None] * int(line)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            self._say({"seconds": seconds, "cpu": cpu, "peak_bytes": peak_memory(), **self._recorded})

    def record(self, **values: float) -> None:
        """Adds numbers to the next answer."""
        for name, value in values.items():
            self._recorded.setdefault(name, []).append(float(value))


def forget_peak_memory() -> None:
    """Makes `peak_memory` begin anew, where Linux lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> int | None:
    """The most resident memory of this process (VmHWM) in bytes; None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class Side:
    """One side's process and what it has measured.

    Attributes:
      name: in tables.
      about: what the worker said of itself.
      rounds: answers of measured rounds.
    """

    def __init__(self, name: str, script: str, job: dict, python: str = sys.executable, **environment: str):
        """Starts `script --worker JOB` and waits until it is ready."""
        read, write = os.pipe()
        self.name, self.rounds, self._all = name, [], []
        self._process = subprocess.Popen(
            [python, script, "--worker", json.dumps({**job, "answers": write})],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=(write,),
            text=True,
            env={**os.environ, **environment},
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self._answers.readline()
        if not line:
            raise WorkerEnded(f"{self.name} ended with code {self._process.wait()}; its message is above")
        return json.loads(line)

    def run(self, units: int, measured: bool = True) -> None:
        """Does so many units of work."""
        assert self._process.stdin is not None  # it is a pipe
        print(units, file=self._process.stdin, flush=True)
        answer = self._answer() | {"units": units}
        self._all.append(answer)
        if measured:
            self.rounds.append(answer)

    def recorded(self, name: str) -> list[float]:
        """All numbers recorded by this name, of rounds that were not measured, too."""
        return [value for answer in self._all for value in answer.get(name, [])]

    def rates(self, seconds: str = "seconds", of: str | None = None) -> list[float]:
        """Units of work per second in each measured round.

        Args:
          seconds: "cpu" for those of the processor.
          of: name of a recorded number that is counted in place of units.
        """
        return [(sum(one[of]) if of else one["units"]) / one[seconds] for one in self.rounds]

    def rate(self, seconds: str = "seconds", of: str | None = None) -> float:
        """The median of `rates`."""
        return statistics.median(self.rates(seconds, of))

    def close(self) -> None:
        """Ends the process and waits for it, so that its memory is free."""
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.close()
        self._process.wait()


def take_turns(sides: list[Side], rounds: int, units: int, warm_up: int = 0) -> None:
    """Measures `rounds` rounds of each side, one after the other in each round, and ends them."""
    if warm_up:
        for side in sides:
            side.run(warm_up, measured=False)
    for number in range(rounds):
        for side in sides:
            side.run(units)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for side in sides:
        side.close()


def machine() -> str:
    """Processor, cores and load of this machine, for the head of a table."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1].strip() if found else "unknown processor"
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
