"""Run folders and the Orbax checkpoints of training: asynchronous, atomic, the last N kept, with the data position.

A run folder holds

    model_config.json    the ModelConfig
    tokenizer.tiktoken   the ranks that the run was trained with
    checkpoints/STEP/    Orbax: `params`, `optimizer` (absent where only weights were written), and metadata

Everything about Orbax's API stays in this file and in weights.py, which reads and writes the weights alone.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from qwen_jax.models.config import ModelConfig
from qwen_jax.training import hosts
from qwen_jax.training.profiling import want_of_memory
from qwen_jax.training.state import TrainState

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "model_config.json"
TOKENIZER_FILE = "tokenizer.tiktoken"
# How a run computes, or what only inference uses: these may change between two starts of one run.
RUNTIME_FIELDS = (
    "dtype",
    "remat",
    "attention_kernel",
    "attention_blocks",
    "embedding_dropout",
    "attention_dropout",
    "use_dynamic_ntk",
    "use_logn",
    "window_sizes",
)


class CheckpointError(ValueError):
    """A checkpoint or run folder that cannot be used, with what is wrong and what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_run_files(folder: Path, config: ModelConfig, tokenizer: str | Path | None) -> None:
    """Puts the model configuration and the tokenizer's ranks into a run folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # First, because it is what makes the folder one of ours after a kill.
    write_atomically(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=1) + "\n")
    if tokenizer is not None:
        temporary = folder / f".{TOKENIZER_FILE}.tmp"
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(folder / TOKENIZER_FILE)


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a run folder.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {CONFIG_FILE}; name the OUTPUT_DIR of a run")
    try:
        return ModelConfig(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a model of this version: {error}") from error


def saved_steps(folder: str | Path) -> list[int]:
    """Steps that a run folder has a complete checkpoint of, ascending."""
    return sorted(int(p.name) for p in (Path(folder) / CHECKPOINTS).glob("*") if p.name.isdigit())


def check_same_model(folder: str | Path, config: ModelConfig) -> None:
    """Refuses a run folder that holds another model than `config`.

    Raises:
      CheckpointError: naming each field that differs.
    """
    there, here = read_config(folder).to_dict(), config.to_dict()
    differing = [
        f"{field} {here[field]!r} here, {there[field]!r} there"
        for field in here
        if here[field] != there[field] and field not in RUNTIME_FIELDS
    ]
    if differing:
        raise CheckpointError(
            f"{folder} holds a checkpoint of another configuration: {'; '.join(differing)}. Use the model's gin file "
            f"that it was made with, or another OUTPUT_DIR"
        )


class Checkpoints:
    """The checkpoints of one run: saved in the background, restored sharded."""

    def __init__(self, folder: str | Path, keep: int = 3, keep_every: int = 0):
        """Opens (or makes) the run folder's checkpoints, of which the last `keep` are kept.

        What a killed save left behind is removed.

        Args:
          keep_every: the checkpoints of multiples of this many steps are kept, too; 0 keeps no others.
        """
        self.folder = (Path(folder) / CHECKPOINTS).absolute()
        self._keep, self._keep_every = keep, keep_every
        # What is on disk may be seen earlier by one process of a job than by another; this is the same in all.
        self._newest: int | None = None
        self._open()

    def _open(self):
        training = ocp.training
        keep = training.preservation_policies.LatestN(self._keep)
        if self._keep_every:
            every = training.preservation_policies.EveryNSteps(self._keep_every)
            keep = training.preservation_policies.AnyPreservationPolicy([keep, every])
        self._manager = training.Checkpointer(
            self.folder,
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=keep,
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(self, step: int, state: TrainState, metadata: dict) -> None:
        """Starts saving; the arrays are copied before it returns, the files are written in the background.

        Does nothing where this step was the last to be saved or restored.

        Args:
          metadata: JSON-ready; where the data stands.

        Raises:
          whatever an earlier save in the background died of.
        """
        if step == self._newest:
            return
        self._newest = step
        self._manager.save_checkpointables_async(
            step, {"params": state.params, "optimizer": state.opt_state}, force=True, custom_metadata=metadata
        )

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait()

    @staticmethod
    def metadata(folder: str | Path, step: int) -> dict:
        """What was saved beside the arrays of a checkpoint: where the data stood.

        Raises:
          CheckpointError: it cannot be read.
        """
        path = (Path(folder) / CHECKPOINTS / str(step)).absolute()
        try:
            metadata = ocp.checkpointables_metadata(path).custom_metadata
            if "next_example" not in (metadata or {}):
                raise ValueError("it says nothing of the data position")
        except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
            raise CheckpointError(f"checkpoint {path} cannot be read: {why_unreadable(error)}") from error
        return metadata

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
        """Restores the newest checkpoint that can be read, each shard straight to its device.

        One that cannot be read is named in the log and set aside as `checkpoints/unreadable-STEP`. All processes of a
        job restore the same one: what one of them cannot read, none uses.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          (state, its metadata), or None if there is no checkpoint at all.

        Raises:
          CheckpointError: there are checkpoints and none can be read.
          JaxRuntimeError: the devices have too little memory, which says nothing of the checkpoints.
        """
        failed = []
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            loaded = metadata = problem = None
            try:
                loaded = ocp.load_checkpointables(path, {"params": abstract.params, "optimizer": abstract.opt_state})
                metadata = self.metadata(self.folder.parent, step)
            except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
                problem = why_unreadable(error)
            problems = hosts.agree(f"restored/{step}", f"the checkpoint of step {step} to be read", problem)
            if problems:
                process, problem = next(iter(problems.items()))
                failed.append(
                    (path, problem if len(problems) == 1 == jax.process_count() else f"in process {process}: {problem}")
                )
                log.warning("checkpoint %s cannot be read (%s); trying the one before", *failed[-1])
                continue
            self._set_aside([path for path, _ in failed])
            self._newest = step
            counter = jax.device_put(np.int32(step), abstract.step.sharding)
            return TrainState(counter, loaded["params"], loaded["optimizer"]), metadata
        if failed:
            rows = "; ".join(f"{path}: {why}" for path, why in failed)
            raise CheckpointError(f"no checkpoint can be read: {rows}. Remove them to start the run anew")
        return None

    def _set_aside(self, paths):
        # The run will save this step again, and Orbax refuses a step that exists.
        def move():
            for path in paths:
                aside = path.with_name(f"unreadable-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                log.warning("set aside as %s", aside)

        if paths:
            self._manager.close()
            hosts.by_first("set aside", "process 0 to set unreadable checkpoints aside", move)
            self._open()

    def close(self) -> None:
        """Waits for the last save and stops the background threads."""
        self._manager.close()


def why_unreadable(error: BaseException) -> str:
    """Why a checkpoint could not be read, on one line.

    Raises:
      JaxRuntimeError: for want of memory. The checkpoint may be as good as any.
    """
    # Orbax says of most things that its handler is incompatible, and what happened is the cause of that.
    while error.__cause__ is not None:
        error = error.__cause__
    if want_of_memory(error):
        raise error
    return one_line(error)


def one_line(error: BaseException) -> str:
    """What an error says, short enough for one line of a log."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
