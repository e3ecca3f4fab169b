"""Going back to an earlier checkpoint of a run, and past the examples that harmed it.

A run folder's `rewinds.json` lists the rewinds. The examples to skip are spans of the global order of one data stream,
so they hold for any checkpoint that the run resumes from, and for any number of hosts. A rewind deletes nothing: it
moves later checkpoints, and copies the metrics, into `rewound_N`, which is a run folder itself.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    TOKENIZER_FILE,
    CheckpointError,
    move_checkpoint,
    read_config,
    saved_steps,
)

log = logging.getLogger(__name__)

REWINDS_FILE = "rewinds.json"


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One return to an earlier checkpoint.

    Attributes:
      to_step, from_step: the checkpoint that the run goes on from, and its newest until then.
      skipped: [start, stop) of the global example indices that are passed over; equal where none are.
      folder: name of the folder with the later checkpoints and the metrics.
      time: of the command, as `time.time()` gives it.
      stream: name of the data stream whose examples are passed over.
      done: False between the command's first and last write.
    """

    to_step: int
    from_step: int
    skipped: tuple[int, int]
    folder: str
    time: float
    stream: str
    done: bool = False


def read_rewinds(folder: str | Path) -> list[Rewind]:
    """The rewinds of a run folder, oldest first.

    Raises:
      CheckpointError: the file cannot be read.
    """
    file = files.as_path(folder) / REWINDS_FILE
    if not file.exists():
        return []
    try:
        return [Rewind(**row | {"skipped": tuple(row["skipped"])}) for row in files.read_json(file)]
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): restore it, or remove it to forget all rewinds of this run"
        ) from error


def skipped_spans(folder: str | Path, stream: str = "train") -> list[tuple[int, int]]:
    """Spans [start, stop) of the global order of a data stream that the run passes over."""
    spans = [rewind.skipped for rewind in read_rewinds(folder) if rewind.stream == stream]
    return [span for span in spans if span[0] < span[1]]


def after_skipped(position: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The first example from `position` on at which a batch may begin: not inside one of the spans [start, stop).

    A batch that begins before a span is read whole, so a span should begin where a batch does.
    """
    for start, stop in sorted(skipped):
        if start <= position < stop:
            position = stop
    return position


def _write(folder: Path, rewinds: list[Rewind]) -> None:
    files.write_json(folder / REWINDS_FILE, [dataclasses.asdict(one) for one in rewinds], indent=1)


def rewind(folder: str | Path, to_step: int, skip_examples: int = 0, stream: str = "train") -> Rewind:
    """Makes the checkpoint of `to_step` the newest of a run that is not running.

    Args:
      skip_examples: how many examples to pass over, counted from where the run would go on, without those that it
        would pass over anyway.
      stream: name of the data stream that they belong to; `train.py` has one, "train".

    Raises:
      CheckpointError: no such checkpoint or data stream, or no run.
      ValueError: a negative number of examples.
    """
    folder = files.as_path(folder)
    read_config(folder)
    finish_rewinds(folder)
    steps, before = saved_steps(folder), read_rewinds(folder)
    if to_step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of step {to_step}; it has {there}")
    if skip_examples < 0:
        raise ValueError(f"expected a number of examples to skip of at least 0, found {skip_examples}")
    positions = Checkpoints.metadata(folder, to_step)["positions"]
    if stream not in positions:
        raise CheckpointError(f"{folder} has no data stream {stream!r}; it has {', '.join(sorted(positions))}")
    earlier = skipped_spans(folder, stream)
    position = after_skipped(positions[stream], earlier)
    number = 1 + max((int(one.folder.rpartition("_")[2]) for one in before), default=0)
    span = (position, _end_of_span(position, skip_examples, earlier))
    made = Rewind(to_step, steps[-1], span, f"rewound_{number}", time.time(), stream)
    # From here on a kill is harmless: the next start of the run, or of this command, finishes the rewind.
    _write(folder, [*before, made])
    finish_rewinds(folder)
    return dataclasses.replace(made, done=True)


def _end_of_span(position: int, count: int, earlier: list[tuple[int, int]]) -> int:
    """Where `count` examples from `position` on end that lie in none of the spans of earlier rewinds."""
    stop = position + count
    for start, end in sorted(earlier):
        start = max(start, position)
        if start >= stop:
            break
        if end > start:
            stop, position = stop + end - start, end
    return stop


def finish_rewinds(folder: str | Path) -> None:
    """Finishes interrupted rewinds; does nothing where all are done."""
    folder = files.as_path(folder)
    rewinds = read_rewinds(folder)
    for index, one in enumerate(rewinds):
        if one.done:
            continue
        aside = folder / one.folder
        (aside / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, TOKENIZER_FILE, METRICS_FILE):
            if (folder / name).exists() and not (aside / name).exists():
                files.copy_file(folder / name, aside / name)
        for step in saved_steps(folder):
            if step > one.to_step:
                move_checkpoint(folder, step, aside / CHECKPOINTS / str(step))
                log.info("checkpoint of step %d set aside in %s", step, aside)
        rewinds[index] = dataclasses.replace(one, done=True)
        _write(folder, rewinds)
