"""The files of a run folder beside its checkpoints: the model's configuration and the tokenizer.

A run folder holds

    model_config.json    the ModelConfig
    tokenizer.tiktoken   the ranks of the run's tokenizer
    metrics.jsonl        one row of figures every few steps
    checkpoints/STEP/    see `qwen_jax.checkpoints.manager`
"""

from pathlib import Path

from qwen_jax import files
from qwen_jax.models.config import ModelConfig

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "model_config.json"
TOKENIZER_FILE = "tokenizer.tiktoken"
METRICS_FILE = "metrics.jsonl"
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
    return sorted(int(p.name) for p in (files.as_path(folder) / CHECKPOINTS).glob("*") if p.name.isdigit())


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
