"""The Orbax checkpoints of a run: asynchronous, atomic, the last N kept, with the position of each data stream.

    checkpoints/STEP/    Orbax: any named trees, and metadata; those of a run are `params`, `frozen`, `optimizer` and
                         `extra`, of which the empty ones are absent (`params` alone where only weights were written)

The metadata of a run is {"positions": {stream: index of the next example}, "fingerprints": {stream: of its data},
"skipped_examples": {stream: [[start, stop], …]}}.

Everything about Orbax's API stays in this file and in arrays.py, which writes the weights alone, and restores them onto
a mesh.
"""

import logging
from pathlib import Path

import jax
import orbax.checkpoint.experimental.v1 as ocp

from qwen_jax import files
from qwen_jax.checkpoints.errors import unreadable_reason
from qwen_jax.checkpoints.run_folder import (
    CHECKPOINTS,
    COMMIT_FILE,
    CheckpointError,
    OldFormatError,
    move_checkpoint,
)
from qwen_jax.distributed import hosts

log = logging.getLogger(__name__)

# Largest chunk of a stacked array.
CHUNK_BYTES = 2**26


class Checkpoints:
    """The checkpoints of one run: saved in the background, restored sharded."""

    def __init__(self, folder: str | Path, keep: int = 3, keep_every: int = 0):
        """Opens (or makes) the run folder's checkpoints, of which the last `keep` are kept.

        Opening removes the remains of a killed save.

        Args:
          keep_every: also keeps the checkpoints of multiples of this number of steps; 0 keeps no others.
        """
        self.folder = (files.as_path(folder) / CHECKPOINTS).absolute()
        self._keep, self._keep_every = keep, keep_every
        # One process of a job may see a file earlier than another does; this is the same in all.
        self._newest: int | None = None
        self._open()

    def _open(self):
        training = ocp.training
        keep = training.preservation_policies.LatestN(self._keep)
        if self._keep_every:
            every = training.preservation_policies.EveryNSteps(self._keep_every)
            keep = training.preservation_policies.AnyPreservationPolicy([keep, every])
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = storage_options
        with context:
            self._manager = training.Checkpointer(
                str(self.folder),
                # Orbax's own policies do not match its types of them: those of the checkpoints' `metrics` differ.
                save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),  # ty: ignore[invalid-argument-type]
                preservation_policy=keep,  # ty: ignore[invalid-argument-type]
                cleanup_tmp_directories=True,
            )

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(self, step: int, trees: dict, metadata: dict) -> None:
        """Starts saving; the arrays are copied before it returns, the files are written in the background.

        Does nothing where this step was the last to be saved or restored.

        Args:
          trees: name to pytree of arrays, such as "params" and "optimizer"; none may be empty.
          metadata: JSON-ready; the positions of the data streams.

        Raises:
          ValueError: a key holds a dot: Orbax joins keys by dots, so two arrays could share one place.
          Exception: the error of an earlier save in the background.
        """
        if step == self._newest:
            return
        check_keys(trees)
        self._newest = step
        self._manager.save_checkpointables_async(step, trees, force=True, custom_metadata=metadata)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait()

    @staticmethod
    def metadata(folder: str | Path, step: int) -> dict:
        """The metadata of a checkpoint: positions of the data streams and their fingerprints.

        Raises:
          OldFormatError: an earlier version wrote it.
          CheckpointError: it cannot be read.
        """
        path = (files.as_path(folder) / CHECKPOINTS / str(step)).absolute()
        try:
            if files.is_remote(path):
                metadata = files.read_json(path / COMMIT_FILE)["metadata"]
            else:
                metadata = ocp.checkpointables_metadata(str(path)).custom_metadata
            if not isinstance(metadata, dict) or not {"positions", "next_example"} & metadata.keys():
                raise ValueError("its metadata has no data position")
        except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
            raise CheckpointError(f"checkpoint {path} cannot be read: {unreadable_reason(error)}") from error
        if "positions" not in metadata:
            raise OldFormatError(
                f"checkpoint {path} has the format of an earlier version, without a position for each data stream: go "
                f"on with the version that wrote it, or start a new OUTPUT_DIR with INITIAL_CHECKPOINT={folder}"
            )
        return metadata

    def restore_latest(self, abstract: dict) -> tuple[int, dict, dict] | None:
        """Restores the newest checkpoint that can be read, each shard straight to its device.

        A checkpoint that cannot be read is named in the log and set aside as `checkpoints/unreadable-STEP`. All
        processes of a job restore the same one: none uses a checkpoint that another cannot read.

        Args:
          abstract: name to pytree of shapes, dtypes and shardings, as `save` was given arrays.

        Returns:
          (step, trees, metadata), or None if there is no checkpoint at all.

        Raises:
          OldFormatError: an earlier version wrote the newest one.
          CheckpointError: there are checkpoints and none can be read.
          JaxRuntimeError: the devices have too little memory; the checkpoints may be intact.
        """
        failed = []
        for step in reversed(self.steps()):
            path = self.folder / str(step)
            loaded = metadata = problem = None
            try:
                metadata = self.metadata(self.folder.parent, step)
                loaded = self._load(step, abstract)
            except OldFormatError:
                raise
            except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
                problem = unreadable_reason(error)
            problems = hosts.agree(f"restored/{step}", f"the checkpoint of step {step} to be read", problem)
            if problems:
                process, problem = next(iter(problems.items()))
                failed.append(
                    (path, problem if len(problems) == 1 == jax.process_count() else f"in process {process}: {problem}")
                )
                log.warning("checkpoint %s cannot be read (%s); trying the one before", *failed[-1])
                continue
            assert loaded is not None and metadata is not None  # no process had a problem, this one neither
            self._set_aside([int(path.name) for path, _ in failed])
            self._newest = step
            return step, loaded, metadata
        if failed:
            rows = "; ".join(f"{path}: {why}" for path, why in failed)
            raise CheckpointError(f"no checkpoint can be read: {rows}. Remove them to start the run anew")
        return None

    def _load(self, step: int, abstract: dict) -> dict:
        return ocp.load_checkpointables(str(self.folder / str(step)), abstract)

    def _set_aside(self, steps: list[int]) -> None:
        # The run will save these steps again, and Orbax refuses a step that exists.
        def move():
            for step in steps:
                aside = self.folder / f"unreadable-{step}"
                move_checkpoint(self.folder.parent, step, aside)
                log.warning("set aside as %s", aside)

        if steps:
            self._stop()
            hosts.run_on_main("set aside", "process 0 to set unreadable checkpoints aside", move)
            self._open()

    def _stop(self) -> None:
        self._manager.close()

    def close(self) -> None:
        """Waits for the last save and stops the background threads."""
        self._manager.close()


def storage_options(key: tuple, value) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Chunks of one layer for large stacked arrays, so that one layer can be read without the others.

    By default a chunk is what a device holds: on a single device, all layers of a parameter (5.8 GB of a 7B model).
    """
    stacked = any(getattr(part, "key", getattr(part, "name", None)) == "layers" for part in key)
    if not stacked or value.ndim < 3 or value.nbytes < CHUNK_BYTES:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,), chunk_byte_size=CHUNK_BYTES)


def check_keys(trees: dict) -> None:
    """Refuses keys with dots.

    Raises:
      ValueError: Orbax joins keys by dots, so two arrays could share one place.
    """
    for path, _ in jax.tree_util.tree_leaves_with_path(trees):
        dotted = [key for key in path if "." in str(getattr(key, "key", getattr(key, "name", "")))]
        if dotted:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: a checkpoint takes no key with a dot, found {dotted[0]}: rename it"
            )
