"""The files of a run folder beside its checkpoints: the model's configuration and the tokenizer.

A run folder holds

    model_config.json    the ModelConfig
    tokenizer.tiktoken   the ranks of the run's tokenizer
    metrics.jsonl        one row of figures every few steps
    checkpoints/STEP/    see `qwen_jax.checkpoints.manager`

In a bucket, a checkpoint is complete by its `commit.json`: see `qwen_jax.checkpoints.bucket`.
"""

import hashlib
from pathlib import Path

from qwen_jax import files
from qwen_jax.models.config import ModelConfig

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "model_config.json"
TOKENIZER_FILE = "tokenizer.tiktoken"
METRICS_FILE = "metrics.jsonl"
# In a bucket, the object of a checkpoint that is written last and deleted first.
COMMIT_FILE = "commit.json"
# Fields of the computation alone, or of inference alone: they may change between two starts of one run.
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
    """A checkpoint or run folder cannot be used; the message gives the fault and the remedy."""


class OldFormatError(CheckpointError):
    """A checkpoint that an earlier version wrote, from which a run cannot go on."""


def write_run_files(folder: Path, config: ModelConfig, tokenizer: str | Path | None) -> None:
    """Puts the model configuration and the tokenizer's ranks into a run folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # First: after a kill, this file identifies the folder as a run folder.
    files.write_json(folder / CONFIG_FILE, config.to_dict(), indent=1)
    if tokenizer is not None:
        files.copy_file(tokenizer, folder / TOKENIZER_FILE)


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a run folder.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    file = files.as_path(folder) / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {CONFIG_FILE}; name the OUTPUT_DIR of a run")
    try:
        return ModelConfig(**files.read_json(file))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a model of this version: {error}") from error


def saved_steps(folder: str | Path) -> list[int]:
    """Steps that a run folder has a complete checkpoint of, ascending."""
    checkpoints = files.as_path(folder) / CHECKPOINTS
    if files.is_remote(checkpoints):
        return sorted(int(p.parent.name) for p in checkpoints.glob(f"*/{COMMIT_FILE}") if p.parent.name.isdigit())
    return sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())


def checksums(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of all files of a local folder, as a commit file has them."""

    def of(name: str) -> dict:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": (folder / name).stat().st_size, "sha256": digest}

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return dict(zip(names, files.in_parallel(of, names), strict=True))


def write_commit_files(folder: Path) -> None:
    """Gives each checkpoint of a local run folder a commit file, for a copy of the folder in a bucket."""
    for step in saved_steps(folder):
        path = folder / CHECKPOINTS / str(step)
        commit = {"step": step, "metadata": None, "files": checksums(path)}
        files.write_json(path / COMMIT_FILE, commit, indent=None)


def move_checkpoint(folder: str | Path, step: int, final: Path) -> None:
    """Makes `final` of the checkpoint of a step, which the run folder then lacks; a killed move is done again.

    A bucket has no renames: its server copies each object, the commit file last, and then the old ones are deleted, the
    commit file first.
    """
    old = files.as_path(folder) / CHECKPOINTS / str(step)
    if not files.is_remote(old):
        final.parent.mkdir(parents=True, exist_ok=True)
        files.remove_tree(final)
        old.rename(final)
        return
    files.remove_tree(final, first=COMMIT_FILE)
    objects = [path for path in files.find(f"{old}/**") if path != old / COMMIT_FILE]
    files.in_parallel(lambda path: files.copy_file(path, final / str(path.relative_to(old))), objects)
    files.copy_file(old / COMMIT_FILE, final / COMMIT_FILE)
    files.remove_tree(old, first=COMMIT_FILE)


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
