"""Writers of the metrics of a run: a JSON-lines file, TensorBoard, and a progress bar."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import METRICS_FILE


def read_metrics(folder: str | Path) -> list[dict]:
    """Rows of a run's metrics file; skips a last line that a kill has truncated."""
    rows = []
    file = files.as_path(folder) / METRICS_FILE
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _summary_writer():
    """The class `tensorboardX.SummaryWriter`, imported as if torch was not installed.

    tensorboardX imports torch where it finds it, to accept torch's tensors: seconds at each start, for nothing.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        # Python documents None, which makes an import fail; its stub leaves that out.
        sys.modules["torch"] = None  # ty: ignore[invalid-assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


class _Screen:
    """Standard error while someone reads it: Ctrl-C ends `tee`, too, and the run is still to be saved."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Hands on what can be handed on."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class MetricsWriter:
    """Writes `metrics.jsonl`, TensorBoard events and the progress bar of one run.

    Rows that an interrupted run wrote after the checkpoint it resumes from are dropped: the resumed run writes them
    again, and the file equals that of an uninterrupted run.
    """

    def __init__(self, folder: str | Path, start_step: int, total_steps: int):
        """Opens the files for a run that goes on after `start_step` updates."""
        folder = Path(folder)
        # A run that begins anew evaluates before its first step again.
        kept = [row for row in read_metrics(folder) if row["step"] <= start_step] if start_step else []
        files.write_text(folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(folder / METRICS_FILE, "a", buffering=1)
        self._board = _summary_writer()(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        self._screen = _Screen()
        self._bar = tqdm(
            file=self._screen,
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one row of scalars after `step` updates. Infinities and NaN are written as null in the JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def describe(self, step: int, facts: dict) -> None:
        """Appends a row of values that are no numbers, such as the kernel, where a start resumes after `step`."""
        self._file.write(json.dumps({"step": step, **facts}) + "\n")
        for name, value in facts.items():
            self._board.add_text(name, str(value), step)

    def progress(self, step: int, shown: dict[str, str] | None = None) -> None:
        """Moves the bar to `step`; `shown` replaces the figures beside it."""
        if shown is not None:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=self._screen)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._bar.close()
        self._board.close()
        self._file.close()


class NoMetrics:
    """In place of a MetricsWriter where another process of the job writes."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes nothing."""

    def describe(self, step: int, facts: dict) -> None:
        """Writes nothing."""

    def progress(self, step: int, shown: dict[str, str] | None = None) -> None:
        """Shows nothing."""

    def say(self, text: str) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Nothing is open."""
