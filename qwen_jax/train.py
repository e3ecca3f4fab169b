"""Trains a model: pretraining, and whatever else has an objective and a SeqIO task.

    python -m qwen_jax.train --gin_file=gin/runs/pretrain_tiny.gin --gin.OUTPUT_DIR=runs/tiny

On several hosts: the same command on each (`qwen_jax.distributed.hosts`).
"""

from qwen_jax.host_memory import keep_freed_memory, restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # here, because it begins again with the imports

import argparse
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import gin
import jax
from jax.sharding import Mesh

from qwen_jax import files
from qwen_jax.alignment.dpo import reference_column
from qwen_jax.batch_spec import Column, image_column, token_columns
from qwen_jax.checkpoints.run_folder import check_same_model, saved_steps, write_run_files
from qwen_jax.command_line import quiet, run
from qwen_jax.compilation_cache import CompilationCache, shared_cache
from qwen_jax.configuration import check_recipe, parse_args
from qwen_jax.conversion.initial_weights import InitialWeights, JoinedWeights
from qwen_jax.conversion.load import find_tokenizer
from qwen_jax.data import task_configuration
from qwen_jax.data.default_tokenizer import default_tokenizer
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.packing import has_segments, is_packed
from qwen_jax.distributed import hosts
from qwen_jax.distributed.watchdog import Watchdog, join_job
from qwen_jax.files import PathLike
from qwen_jax.image_rows import check_image_tokens, check_images
from qwen_jax.models.build import build_model, parameter_count
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import abstract_params
from qwen_jax.reference_column import ReferenceModel, with_reference
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.batches import Examples, Prefetcher
from qwen_jax.training.goodput import process_start_time
from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.program import check_run, device_memory
from qwen_jax.training.run import COMPILED, Run, open_run
from qwen_jax.training.step import batch_shapes
from qwen_jax.training.trainer import Trainer, standard_callbacks
from qwen_jax.training.trainer_config import TrainerConfig

log = logging.getLogger(__name__)


def train(
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    trainer: TrainerConfig,
    mixture_or_task: str,
    output_dir: PathLike,
    cache_dir: PathLike,
    mesh: MeshConfig = MeshConfig(),
    objective: Objective = next_token_prediction(),
    initial_checkpoint: PathLike | None = None,
    initial_subtree: str | Sequence[str] | Mapping[str, str] | None = None,
    data_seed: int = 0,
    epochs: float | None = None,
    reference: ReferenceModel | None = None,
    packing: str = "concat",
    images_per_row: int = 0,
    image_workers: int | None = None,
    vision_checkpoint: PathLike | None = None,
    compiler_options: dict | None = None,
    compilation_cache: PathLike | None = "auto",
    watchdog: Watchdog | None = None,
    began: float | None = None,
) -> dict[str, float]:
    """Starts or continues the run in `output_dir`.

    In a job of several processes all call it with the same arguments. Process 0 prepares the data and writes the files.

    Args:
      mixture_or_task: name of a SeqIO task or mixture of `tasks/`; the run caches it in `cache_dir` if it is not yet.
      initial_checkpoint: initial weights of a new run: a run folder, or a model in an external format.
      initial_subtree: part of these weights; see `InitialWeights`. None: all.
      data_seed: seed for the order of the examples.
      epochs: the run ends after so many passes over the examples, if `trainer.train_steps` does not end it before.
      reference: model whose log-probabilities become a column of the examples (DPO).
      packing: "concat" merges documents and cuts them to the sequence length, as the report does; "best_fit" puts whole
        documents into sequences, and attention and positions stay within each; "whole" does so with conversations and
        pairs, and cuts none into two sequences; "padded" has one document a sequence.
      images_per_row: the most pictures of a sequence, for a model with an image encoder; 0: text alone.
      image_workers: processes of this host that decode pictures; see `ExampleLoader`.
      vision_checkpoint: initial weights of the image encoder of a new run, in place of those that `initial_checkpoint`
        has: a run folder, or released weights with an encoder.
      compiler_options: options of XLA for the train step, by name; hardware files set them.
      compilation_cache: folder of compiled programs, for a quick next start; None: no cache. "auto" keeps them in
        `output_dir`; on CPUs, where a program may not run on another machine, and for a bucket, in `shared_cache`.
      watchdog: receives the activity of the run.
      began: `time.time()` when the process started.

    Returns:
      The last metrics, with "step".

    Raises:
      ValueError, OSError: the run cannot start or go on; the message says what to change.
    """
    output, cache_dir = files.as_path(output_dir, "OUTPUT_DIR"), files.as_path(cache_dir, "CACHE_DIR")
    check_length(trainer, model)
    where = {"cache_dir": cache_dir, "sequence_length": trainer.sequence_length, "packing": packing}
    where["images_per_row"] = images_per_row
    with_reference = reference is not None
    check_images(images_per_row, where["sequence_length"], model, workers=image_workers, with_reference=with_reference)
    initial_weights = find_initial_weights(initial_checkpoint, initial_subtree, vision_checkpoint, model)
    check_initial_weights(initial_weights, model, output)
    devices = make_mesh(mesh)
    columns = batch_columns(trainer.sequence_length, packing, reference, images_per_row, model)
    check_state(build_model(model), optimizer, trainer, devices, columns)
    with open_run(output, lambda folder: check_same_model(folder, model), watchdog=watchdog, began=began) as run_folder:
        train_set, eval_set = open_data(mixture_or_task, where, data_seed, model, run_folder, image_workers)
        if eval_set is not None and not trainer.eval_batches:
            log.warning("EVAL_BATCHES is 0: no held-out loss is measured")
        trainer, documents = trainer.within_epochs(epochs, len(train_set)), train_set.documents
        if reference is not None:
            train_set, eval_set = add_reference(reference, train_set, eval_set, model, trainer, devices, run_folder)
        shapes = batch_shapes(devices, trainer.batch_size, train_set.columns)
        training = Trainer(
            run_folder,
            build_model(model),
            objective,
            optimizer,
            trainer,
            devices,
            Prefetcher(train_set, shapes, run_folder.skipped_examples("train")),
            standard_callbacks(run_folder, trainer, optimizer, eval_set),
            initial_weights=initial_weights,
            cache=find_cache(compilation_cache, run_folder.folder),
            compiler_options=compiler_options,
        )
        rows = f"{len(train_set):,} examples of {trainer.sequence_length} tokens with {documents:,} documents"
        about = f"attention by {training.kernel}, {mixture_or_task} of {rows} per epoch, {trainer.train_steps:,} steps"
        return carry_out(training, model, f"{parameter_count(model):,} parameters", about)


def carry_out(training: Trainer, model: ModelConfig, what: str, about: str) -> dict[str, float]:
    """Compiles, restores or starts the run, writes the files beside its checkpoints, and trains.

    Args:
      model: the configuration that the run folder is known by elsewhere.
      what, about: of the run, for the log: what is trained, and how.

    Returns:
      The last metrics, with "step".
    """
    training.prepare()
    if hosts.process_index() == 0:
        folder, mesh = training.run_folder.folder, training.mesh
        write_run_files(folder, model, default_tokenizer().path)
        files.write_text(folder / "config.gin", gin.config_str())
        log.info(
            "%s: %s, %d device(s) as %s, %d process(es), %s",
            *(folder, what, mesh.size, dict(mesh.shape), hosts.process_count(), about),
        )
    return training.run()


def check_state(
    model: Model, optimizer: OptimizerConfig, trainer: TrainerConfig, devices: Mesh, columns: Sequence[Column]
) -> None:
    """Checks that batch, model and mesh divide, and that the state can fit.

    Raises:
      ValueError: as `check_run`.
    """
    check_run(
        model,
        optimizer,
        trainer.train_steps,
        devices,
        batch_size=trainer.batch_size,
        columns=columns,
        accumulation=trainer.accumulation(devices),
        memory=device_memory(devices),
    )


def find_initial_weights(
    checkpoint: PathLike | None,
    subtree: str | Sequence[str] | Mapping[str, str] | None,
    vision_checkpoint: PathLike | None,
    model: ModelConfig,
) -> InitialWeights | JoinedWeights | None:
    """Initial weights of the arguments of `train`; None: all are random."""
    weights = None if checkpoint is None else InitialWeights(checkpoint, subtree, model)
    if vision_checkpoint is None:
        return weights
    encoder = InitialWeights(vision_checkpoint, ["vision"])
    return encoder if weights is None else JoinedWeights([weights, encoder])


def check_initial_weights(weights: InitialWeights | JoinedWeights | None, model: ModelConfig, output: Path) -> None:
    """Compares initial weights, if any, with the model, before the minutes of preparing data and compiling.

    A run that goes on in `output` does not read them.

    Raises:
      FileNotFoundError, ValueError: as `InitialWeights.check`.
    """
    if weights is None or saved_steps(output):
        return
    weights.check(nn.meta.unbox(abstract_params(build_model(model))))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = find_tokenizer(weights.path, Path(scratch))
    except ValueError as error:
        log.warning("the vocabulary of the initial weights is not compared with VOCABULARY: %s", error)
        return
    if tokenizer is not None and tokenizer.fingerprint != default_tokenizer().fingerprint:
        log.warning(
            "%s was trained with another vocabulary than VOCABULARY (%s): its embedding and output rows stand for "
            "other tokens",
            *(weights.path, default_tokenizer().path),
        )


def open_data(
    mixture_or_task: str,
    where: dict,
    seed: int,
    model: ModelConfig,
    run_folder: Run,
    image_workers: int | None = None,
) -> tuple[ExampleLoader, ExampleLoader | None]:
    """(training set, held-out set or None) of a task, cached and packed if it is not yet; the same in all processes.

    Raises:
      ValueError, OSError: see `prepare_task`, `load_data` and `check_same_data`.
    """
    prepare_data(mixture_or_task, where, run_folder)
    train_set, eval_set = load_data(mixture_or_task, where, seed, model, image_workers)
    fingerprints = [one.fingerprint for one in (train_set, eval_set) if one is not None]
    check_same_data(mixture_or_task, where["cache_dir"], fingerprints)
    return train_set, eval_set


def prepare_data(mixture_or_task: str, where: dict, run_folder: Run) -> None:
    """Caches and packs a task in process 0; the other processes wait for it."""
    run_folder.activity.now("preparing data", limited=False)

    def cache_and_pack():
        # A run that goes on takes its data as they lie (their fingerprint is checked), whatever became of the corpus.
        if not saved_steps(run_folder.folder):
            prepare_task(mixture_or_task, where)

    hosts.run_on_main(f"data/{mixture_or_task}", f"process 0 to cache and pack {mixture_or_task}", cache_and_pack)
    run_folder.goodput.count("preparing data")
    run_folder.activity.now("opening the data")


def batch_columns(
    length: int, packing: str, reference: ReferenceModel | None, images_per_row: int, model: ModelConfig
) -> tuple[Column, ...]:
    """The columns of a batch of rows of `length` tokens, known before there are data."""
    columns = token_columns(length, packed=has_segments(packing))
    if images_per_row and model.vision is not None:
        columns += (image_column(images_per_row, model.vision.image_size),)
    return columns if reference is None else (*columns, reference_column(length))


def add_reference(
    reference: ReferenceModel,
    train_set: ExampleLoader,
    eval_set: ExampleLoader | None,
    model: ModelConfig,
    trainer: TrainerConfig,
    devices: Mesh,
    run_folder: Run,
) -> tuple[Examples, Examples | None]:
    """The data sets with the column of the reference model, which is computed where it is missing."""
    found = with_reference(
        reference,
        [one for one in (train_set, eval_set) if one is not None],
        model,
        devices,
        batch_size=trainer.batch_size // trainer.accumulation(devices),
        say=lambda what: run_folder.activity.now(what, limited=False),
    )
    run_folder.goodput.count("preparing data")
    run_folder.activity.now("opening the data")
    return found[0], found[1] if len(found) > 1 else None


def check_length(trainer: TrainerConfig, model: ModelConfig) -> None:
    """Refuses rows that are longer than the model's context.

    Raises:
      ValueError: the message has both lengths.
    """
    if trainer.sequence_length > model.context_length:
        raise ValueError(
            f"SEQUENCE_LENGTH {trainer.sequence_length} is more than ModelConfig.context_length "
            f"{model.context_length}: lower the one or raise the other"
        )


def prepare_task(mixture_or_task: str, where: dict) -> None:
    """Caches and packs the splits that the cache lacks.

    Manifests show that a cache is complete, without TensorFlow. Where a gin file configures the task, the cache is
    compared with that configuration.

    Raises:
      ValueError, OSError: see `qwen_jax.data.cache.prepare`.
      ModuleNotFoundError: SeqIO or Beam is necessary and not installed.
    """
    packed = is_packed(mixture_or_task, **where)
    if packed and not task_configuration.is_bound():
        return
    try:
        with quiet():  # what TensorFlow and Beam write when imported
            from qwen_jax.data.cache import prepare
    except ModuleNotFoundError as error:
        if not is_packed(mixture_or_task, **where, splits=("train",)):
            raise
        log.warning(
            "%s is used as it is cached: its corpus is not looked at, as %s is missing", mixture_or_task, error.name
        )
        return
    prepare(mixture_or_task, **where)


def load_data(
    mixture_or_task: str,
    where: dict,
    seed: int,
    model: ModelConfig,
    image_workers: int | None = None,
) -> tuple[ExampleLoader, ExampleLoader | None]:
    """(training set, held-out set or None) of a cached task.

    Raises:
      ValueError: the data has another vocabulary, the model is too small for it, or gives pictures other places.
    """
    image_size = None if model.vision is None else model.vision.image_size
    where = where | {"image_size": image_size, "image_workers": image_workers}
    train_set = ExampleLoader(mixture_or_task, split="train", seed=seed, **where)
    try:
        eval_set = ExampleLoader(mixture_or_task, split="validation", shuffle=False, repeat=False, **where)
    except FileNotFoundError:
        log.warning("%s has no held-out examples: no held-out loss is measured", mixture_or_task)
        eval_set = None
    if train_set.vocabulary_fingerprint != default_tokenizer().fingerprint:
        raise ValueError(
            f"{mixture_or_task} in {where['cache_dir']} was made with another vocabulary than VOCABULARY "
            f"({default_tokenizer().path}): name the one it was made with, or another CACHE_DIR"
        )
    if train_set.vocab_size > model.vocab_size:
        raise ValueError(
            f"the vocabulary has {train_set.vocab_size} ids and the model {model.vocab_size} rows: choose a model with "
            f"ModelConfig.vocab_size >= {train_set.vocab_size}, or another VOCABULARY"
        )
    for one in (train_set, eval_set):
        check_image_tokens(mixture_or_task, 0 if one is None else one.image_tokens, model)
    return train_set, eval_set


def check_same_data(name: str, cache_dir: PathLike, fingerprints: list[str]) -> None:
    """Compares the data of this process with those of process 0.

    Raises:
      ValueError: the data differ; the watchdog reports the process.
    """
    if hosts.run_on_main(f"same data/{name}", "process 0 to open the data", lambda: fingerprints) != fingerprints:
        raise ValueError(
            f"the data of {name} in {cache_dir} are not those of process 0: all hosts must see the same CACHE_DIR, or "
            f"copies of it"
        )


def find_cache(folder: PathLike | None, output: Path) -> CompilationCache:
    """The cache of compiled programs for the argument `compilation_cache` of `train`."""
    if folder != "auto":
        return CompilationCache(None if folder is None else files.as_path(folder, "COMPILATION_CACHE").absolute())
    if jax.default_backend() == "cpu" or files.is_remote(output):
        return shared_cache()
    return CompilationCache((output / COMPILED).absolute())


def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.train",
        description="Trains a model, or continues the run in OUTPUT_DIR.",
        epilog="example: python -m qwen_jax.train --gin_file=gin/runs/pretrain_tiny.gin --gin.OUTPUT_DIR=runs/tiny. "
        "The macros of a run are listed in its gin file.",
    )
    hosts.add_arguments(parser)
    configured = gin.configurable(train)
    args = parse_args(parser, argv)
    if not args.gin_file:
        parser.error("name at least one --gin_file; see the example in --help")
    check_recipe("train", train)
    keep_freed_memory()
    with join_job(hosts.job_config(args), gin.config_str()) as watchdog:
        result = configured(watchdog=watchdog, began=process_start_time())
    if jax.process_index() == 0:
        print(", ".join(f"{name} {value:.6g}" for name, value in result.items() if not name.startswith("hosts/")))


if __name__ == "__main__":
    run(main)
