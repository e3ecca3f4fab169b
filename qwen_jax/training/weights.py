"""The weights of run folders without the optimizer: written as a run of their own, read as arrays or onto a mesh."""

import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import SingleDeviceSharding

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.training.checkpoints import (
    CHECKPOINTS,
    TOKENIZER_FILE,
    CheckpointError,
    one_line,
    read_config,
    saved_steps,
    write_run_files,
)


def tokenizer_path(path: str | Path) -> Path | None:
    """The .tiktoken file of a run folder (or of one step's folder in it), or None."""
    file = _run_folder(Path(path))[0] / TOKENIZER_FILE
    return file if file.is_file() else None


def save_params(folder: str | Path, config: ModelConfig, params, tokenizer: str | Path | None) -> None:
    """Writes weights alone as a run folder with one checkpoint, at step 0.

    Args:
      folder: must not exist, or be empty. Appears whole or not at all.
      params: the parameter pytree, numpy or jax arrays.
      tokenizer: a .tiktoken file to copy, or None.

    Raises:
      CheckpointError: the folder has something in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: choose another output folder, or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_run_files(temporary, config, tokenizer)
        ocp.save_checkpointables((temporary / CHECKPOINTS / "0").absolute(), {"params": params})
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_folder(path: Path) -> tuple[Path, int | None]:
    """(run folder, step or None) of a path that is a run folder or the folder of one step."""
    path = path.absolute()
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _step_folder(path: str | Path, step: int | None) -> Path:
    run, named = _run_folder(Path(path))
    steps = saved_steps(run)
    wanted = step if step is not None else named
    if not steps:
        raise CheckpointError(f"{run} has no checkpoint under {CHECKPOINTS}/: was it stopped before its first save?")
    if wanted is not None and wanted not in steps:
        raise CheckpointError(f"{run} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}")
    return run / CHECKPOINTS / str(steps[-1] if wanted is None else wanted)


def restore_params(path: str | Path, abstract, step: int | None = None):
    """Weights without the optimizer, placed as `abstract` says (a pytree of ShapeDtypeStructs with shardings).

    Args:
      path: a run folder (its newest checkpoint unless `step` names one), or the folder of one step.

    Raises:
      CheckpointError: no such checkpoint, or it cannot be read as these shapes.
    """
    folder = _step_folder(path, step)
    try:
        return ocp.load_checkpointables(folder, {"params": abstract})["params"]
    except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
        raise CheckpointError(f"checkpoint {folder} cannot be read: {one_line(error)}") from error


def load_params(path: str | Path, step: int | None = None) -> tuple[ModelConfig, dict]:
    """(ModelConfig, nested dict of float32 numpy arrays) of a run folder or of one step's folder.

    Raises:
      CheckpointError: as `read_config` and `restore_params`.
    """
    config = read_config(_run_folder(Path(path))[0])
    one_device = SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device),
        nn.meta.unbox(abstract_params(Qwen(config))),
    )
    return config, jax.tree.map(np.asarray, restore_params(path, abstract, step))
