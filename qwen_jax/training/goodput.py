"""Where the time of a run went, over all of its starts: `goodput.json` in the run's folder.

Goodput is the time of steps that count over all time since the first start. What is written at every row of metrics
survives a kill; the time between the last row and the next start counts as idle, since no process measured it.
"""

import dataclasses
import logging
import os
import time
from pathlib import Path

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import CheckpointError

log = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.json"


def process_start_time() -> float:
    """`time.time()` when this process started, before its imports; now, where the system does not tell."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        age = 0.0
    return time.time() - max(age, 0.0)


@dataclasses.dataclass
class _Start:
    """One start of the run. `to`: its last known step; `kept`: its last step that no later start made again."""

    began: float
    first: int = 0
    to: int = 0
    kept: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def useful(self) -> float:
        """Seconds of the steps that count."""
        seconds, made = self.seconds.get("steps", 0.0), self.to - self.first
        return seconds * (self.kept - self.first) / made if made else seconds


def _read(file: Path) -> list[_Start]:
    try:
        return [_Start(**start) for start in files.read_json(file)["starts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): restore it, or remove it to begin anew") from error


def _shares(starts: list[_Start]) -> dict[str, float]:
    end = starts[-1].began + sum(starts[-1].seconds.values())
    total = max(end - starts[0].began, 1e-9)
    spent: dict[str, float] = {"steps": 0.0}
    for start in starts:
        for cause, seconds in start.seconds.items():
            spent[cause] = spent.get(cause, 0.0) + (start.useful if cause == "steps" else seconds)
    lost = sum(start.seconds.get("steps", 0.0) - start.useful for start in starts)
    if len(starts) > 1:
        spent["lost steps"] = lost
        spent["idle"] = max(total - sum(spent.values()), 0.0)
    return {cause: seconds / total for cause, seconds in spent.items()}


def written_shares(folder: str | Path) -> dict[str, float] | None:
    """`Goodput.shares` of a run as last written; None for a run without an account.

    Raises:
      CheckpointError: the account cannot be read.
    """
    file = files.as_path(folder) / GOODPUT_FILE
    return _shares(_read(file)) if file.exists() else None


class Goodput:
    """Adds up the seconds of this start by cause; one object in process 0."""

    def __init__(self, folder: str | Path, began: float | None = None):
        """Opens the account of a run; begins a new one where the file cannot be read, since a run can train without it.

        Args:
          began: `time.time()` when the process started.
        """
        self._folder = Path(folder)
        file = self._folder / GOODPUT_FILE
        try:
            self._before = _read(file) if file.exists() else []
        except CheckpointError as error:
            log.warning("%s. The account of the run's time begins with this start", error)
            self._before = []
        now = time.time()
        self._start = _Start(now if began is None else began)
        self._since = time.perf_counter() - (now - self._start.began)

    def count(self, cause: str) -> None:
        """Adds the time since the last call to `cause`."""
        now = time.perf_counter()
        seconds = self._start.seconds
        seconds[cause] = seconds.get(cause, 0.0) + now - self._since
        self._since = now

    def resumed(self, step: int) -> None:
        """Records that this start resumes after `step`, so later steps of earlier starts were lost."""
        self._start.first = self._start.to = self._start.kept = step
        for start in self._before:
            start.kept = min(start.kept, max(step, start.first))

    def write(self, step: int) -> None:
        """Saves the account after `step`."""
        self._start.to = self._start.kept = step
        starts = [dataclasses.asdict(start) for start in [*self._before, self._start]]
        files.write_json(self._folder / GOODPUT_FILE, {"starts": starts}, indent=1)

    def shares(self) -> dict[str, float]:
        """Share of all time since the first start by cause, those of the unbroken run first; they sum to 1.

        "steps" is the goodput. "lost steps" were made again by a later start, "idle" lies between two starts.
        """
        return _shares([*self._before, self._start])

    def __str__(self) -> str:
        total = self._start.began + sum(self._start.seconds.values()) - [*self._before, self._start][0].began
        shares = self.shares()
        causes = ", ".join(f"{cause} {share:.1%}" for cause, share in shares.items() if cause != "steps")
        number = len(self._before) + 1
        return (
            f"goodput {shares['steps']:.1%} of {total:,.0f} s over {number} start{'s' * (number > 1)}; "
            f"the rest: {causes}"
        )
