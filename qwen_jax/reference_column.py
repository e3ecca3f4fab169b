"""The column of reference log-probabilities of DPO: computed once by the reference model, kept beside the packed data.

The model is in memory only while its column is computed, before the first state of the run exists. The column belongs
to the records and to the weights: with others it is computed anew, and an interrupted computation goes on.
"""

import dataclasses
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.alignment.dpo import REFERENCE_COLUMN, reference_column, response_log_probs
from qwen_jax.batch_spec import is_packed, row_length
from qwen_jax.conversion.load import find_tokenizer, load_pretrained, read_model_config, weight_files
from qwen_jax.data.derived import DerivedColumn, WithColumn
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.packing import packed_folder
from qwen_jax.distributed import hosts
from qwen_jax.files import PathLike, as_path
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import use_mesh
from qwen_jax.training.batches import global_batch
from qwen_jax.training.step import batch_shapes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """The reference model of DPO.

    Attributes:
      checkpoint: a run folder, or a model in an external format; usually the run's own initial checkpoint.
    """

    checkpoint: PathLike

    def __post_init__(self):
        as_path(self.checkpoint, "REFERENCE_CHECKPOINT")

    @property
    def path(self) -> Path:
        """Path of the checkpoint."""
        return as_path(self.checkpoint, "REFERENCE_CHECKPOINT")

    def config(self, model: ModelConfig) -> ModelConfig:
        """Configuration of the reference, with dtype and attention kernel of the trained model.

        Raises:
          ValueError: it has no token head, or another vocabulary size.
          OSError: no such checkpoint.
        """
        found = read_model_config(self.path)
        if found.head != "tokens":
            raise ValueError(f"REFERENCE_CHECKPOINT {self.path} is a reward model: DPO needs a language model")
        if found.vocab_size != model.vocab_size:
            raise ValueError(
                f"REFERENCE_CHECKPOINT {self.path} has {found.vocab_size} vocabulary rows and the trained model "
                f"{model.vocab_size}: name a reference with the vocabulary of the trained model"
            )
        return dataclasses.replace(
            found,
            dtype=model.dtype,
            attention_kernel=model.attention_kernel,
            attention_blocks=model.attention_blocks,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            lora=None,  # loading merges adapters
        )


def weights_digest(path: Path) -> str:
    """SHA-256 of the files that hold the weights of a checkpoint, whatever their folder is called."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        digest.update(file.name.encode())
        with files.open_file(file) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def check_vocabulary(path: Path, fingerprint: str) -> None:
    """Refuses a checkpoint whose tokenizer is not that of the data; one without a tokenizer passes.

    Raises:
      ValueError: the message names both.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = find_tokenizer(path, Path(scratch))
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary ({tokenizer.fingerprint[:12]}) than the data has "
            f"({fingerprint[:12]}): name a checkpoint with the vocabulary of the data, or cache the data with its own"
        )


def with_reference(
    reference: ReferenceModel,
    loaders: Sequence[ExampleLoader],
    model: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[WithColumn]:
    """The loaders with the column of the reference, which is computed where it is missing.

    All processes of a job call it with the same arguments and see the same CACHE_DIR; process 0 writes.

    Args:
      loaders: of packed pairs, one for each split.
      model: configuration of the trained model.
      batch_size: rows to compute at once, over all devices.
      say: told what is being done.

    Raises:
      ValueError: the reference does not fit, or gives log-probabilities that are not finite.
      OSError: its files cannot be read.
    """
    config = reference.config(model)
    say("identifying the reference model")
    weights = hosts.run_on_main(
        "reference weights", "process 0 to read the reference", lambda: weights_digest(reference.path)
    )
    origin = json.dumps([weights, config.dtype, config.attention_kernel])
    columns: dict[tuple[str, str], DerivedColumn] = {}
    for loader in loaders:
        for task, manifest in loader.manifests.items():
            folder = packed_folder(loader.cache_dir, task, loader.sequence_length, loader.split, loader.packing)
            columns[task, loader.split] = DerivedColumn(
                folder, REFERENCE_COLUMN, manifest.records, loader.sequence_length, manifest.fingerprint, origin
            )
    missing = hosts.run_on_main(
        "reference column",
        "process 0 to look for the column of the reference",
        lambda: [[*key, column.missing()] for key, column in columns.items()],
    )
    if any(starts for _, _, starts in missing):
        check_vocabulary(reference.path, loaders[0].vocabulary_fingerprint)
        _compute(reference.path, config, mesh, loaders, columns, missing, batch_size, say)
    hosts.run_on_main("reference kept", "process 0 to finish the column", lambda: _finish(columns))
    return [
        WithColumn(
            loader,
            reference_column(loader.sequence_length),
            {task: columns[task, loader.split] for task in loader.manifests},
        )
        for loader in loaders
    ]


def _finish(columns: dict[tuple[str, str], DerivedColumn]) -> None:
    for column in columns.values():
        column.finish()


def _compute(path: Path, config: ModelConfig, mesh: Mesh, loaders, columns, missing, batch_size: int, say) -> None:
    """Computes the missing files of the columns, a batch of records at a time."""
    say("loading the reference model")
    _, params = load_pretrained(path, config.dtype, mesh)
    shapes, model = batch_shapes(mesh, batch_size, loaders[0].columns), Qwen(config)
    model.attention(row_length(loaders[0].columns), is_packed(loaders[0].columns), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: x.sharding, (params, shapes))
    compute = jax.jit(
        lambda params, batch: response_log_probs(model, params, batch), in_shardings=placed, out_shardings=everywhere
    )
    with use_mesh(mesh):
        compute = compute.lower(params, shapes).compile()
    cached = {loader.split: loader for loader in loaders}
    total = sum(columns[task, split].stop(start) - start for task, split, starts in missing for start in starts)
    log.info("%s: log-probabilities of %s rows, once", path, f"{total:,}")
    with tqdm(total=total, unit="row", desc="reference", disable=hosts.process_index() > 0) as bar:
        for task, split, starts in missing:
            rows = _in_order(cached[split], task)
            column = columns[task, split]
            for start in starts:
                say(f"computing the reference of {task}, {split}, from row {start}")
                values = []
                for first in range(start, column.stop(start), batch_size):
                    found = np.asarray(compute(params, global_batch(rows, first, shapes)))
                    values.append(found[: column.stop(start) - first])
                    bar.update(len(values[-1]))
                if hosts.process_index() == 0:
                    column.write(start, np.concatenate(values))


def _in_order(loader: ExampleLoader, task: str) -> ExampleLoader:
    """The records of one task of a loader, record i at index i."""
    return ExampleLoader(
        task,
        cache_dir=loader.cache_dir,
        sequence_length=loader.sequence_length,
        split=loader.split,
        shuffle=False,
        repeat=False,
        packing=loader.packing,
    )
