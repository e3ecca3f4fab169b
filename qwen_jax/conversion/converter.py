"""Conversion of a model to another format: streamed, whole or not at all, verified on request."""

import contextlib
import logging
from pathlib import Path

from qwen_jax import files
from qwen_jax.conversion import adapters, gguf_file, huggingface, run_folder
from qwen_jax.conversion.checksums import Checksums, flush
from qwen_jax.conversion.load import FORMAT_NAMES, ORBAX, check_rows, find_tokenizer, open_weights
from qwen_jax.conversion.mapping import FORMATS, Format, Weights, external_tensors
from qwen_jax.conversion.merging import without_adapters
from qwen_jax.conversion.padding import repad
from qwen_jax.conversion.pipelines import assembled
from qwen_jax.conversion.run_folder import LAYOUTS, SCANNED, RunFolder
from qwen_jax.conversion.targets import check_free, staged_target
from qwen_jax.conversion.tokenizer import write_tokenizer
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.files import PathLike, as_path
from qwen_jax.models.config import ModelConfig

TABLES = {**FORMATS, gguf_file.NAME: gguf_file.GGUF}

log = logging.getLogger(__name__)


def convert(
    source_format: str,
    source: PathLike,
    target_format: str,
    target: PathLike,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: PathLike | None = None,
    progress: bool = True,
    *,
    vocab_size: int | None = None,
    layout: str = SCANNED,
    verify: bool = False,
    base: PathLike | None = None,
) -> Path:
    """Writes the model of one folder as a new folder, with its tokenizer.

    The numbers are unchanged unless `dtype` rounds them. LoRA adapters are merged into their kernels in float32, and
    the sums rounded once; format "peft" alone keeps them apart. A log warning names features that the target
    format cannot express. Memory holds one tensor at a time, never the model.

    Args:
      source_format, target_format: "orbax" (our run folder), "qwen" (QWenLMHeadModel), "qwen2" (Qwen2ForCausalLM),
        "qwen2_reward" (Qwen2ForSequenceClassification with one label), "gguf" (a file for llama.cpp) or "peft" (a LoRA
        adapter; written from a run folder alone, without tokenizer).
      source: the folder or file to read; for orbax a run folder (newest step) or the folder of one step.
      target: the folder or file to write; must not exist, or be an empty folder. It appears whole, or not at all.
      dtype: dtype of the written weights, "float32" or "bfloat16". None: that of the source. Training reads either from
        a run folder, and writes float32.
      max_shard_size: bytes of one safetensors file, as a number or as in "5GB".
      tokenizer: a .tiktoken file. None: the tokenizer of the source, if it has one.
      progress: whether to show progress bars.
      vocab_size: rows of the vocabulary in the target. None: those of the source.
      layout: layout of a written run folder, "scanned" (blocks stacked, as training reads them) or "unscanned".
      verify: whether to read the files back from disk and compare hashes before `target` appears.
      base: of an adapter, its base model. To read one: a folder (None: the one that the adapter names). To write one: a
        name or a folder for adapter_config.json; a folder here is compared with the run's frozen parameters.

    Returns:
      The absolute path of `target`.

    Raises:
      FileNotFoundError, ValueError: naming the error in the arguments, the source or the target; OSError: from
        the file system; ChecksumError: `verify` found a difference. Nothing is written then.
    """
    source, target = as_path(source), as_path(target).absolute()
    tokenizer = None if tokenizer is None else as_path(tokenizer)
    shard_size = huggingface.parse_size(max_shard_size)
    _check_arguments(source_format, target_format, dtype, target, layout)
    weights = open_weights(source, source_format, base)
    checksums = Checksums(wanted=verify)
    if target_format == adapters.NAME:
        return _convert_adapter(weights, target, base, dtype or "float32", checksums, progress)
    weights = without_adapters(weights)
    if target_format != ORBAX:
        external_tensors(TABLES[target_format], weights.config)  # refuses what the format cannot express
    with staged_target(target, target_format) as (scratch, result):
        found = _tokenizer(source, tokenizer, scratch, weights.config, base)
        weights = repad(weights, vocab_size, found, source)
        dtype = dtype or weights.dtype
        if target_format != ORBAX:
            _check_pad_token(TABLES[target_format], found, source)
            _warn_of_losses(TABLES[target_format], weights.config)
        if target_format == ORBAX:
            side, ranks = run_folder, found.path if found else None
            run_folder.write_run_folder(result, weights, dtype, ranks, layout, checksums, progress)
        elif target_format == gguf_file.NAME:
            side = gguf_file
            gguf_file.write_gguf(result, weights, found, dtype, checksums, progress)
        else:
            side = huggingface
            _write_external(FORMATS[target_format], weights, result, dtype, shard_size, found, checksums, progress)
        if verify:
            _verify(side.read_again, result, checksums, progress)
        if target_format in FORMATS:
            # In a bucket, this file is what makes the folder a model.
            content = _external_config(FORMATS[target_format], weights, dtype, found)
            files.write_json(result / huggingface.CONFIG_FILE, content)
    return target


def _verify(read_again, result: Path, checksums: Checksums, progress: bool) -> None:
    if not files.is_remote(result):
        flush(result)
    count = checksums.compare(read_again(result), progress)
    log.info("verified: %d tensors read back as they were written", count)


def _convert_adapter(
    weights: Weights,
    target: Path,
    base: PathLike | None,
    dtype: str,
    checksums: Checksums,
    progress: bool,
) -> Path:
    """Writes the adapter of a run folder; arguments and errors as in `convert`."""
    if not isinstance(weights, RunFolder):
        raise ValueError("an adapter is written from a run folder (orbax) alone: it knows what was trained")
    if base is None:
        raise ValueError("name the base model of the adapter (--base): the folder or name that peft loads it on")
    if files.as_path(base).exists():
        adapters.check_base(weights, open_weights(base), base)
    else:
        log.warning("warning: %s is no folder here, so the run's frozen parameters are not compared with it", base)
    with staged_target(target, adapters.NAME) as (_, result):
        adapters.write_adapter(result, weights, base, dtype, checksums, progress)
        if checksums.wanted:
            _verify(adapters.read_again, result, checksums, progress)
    return target


def _check_arguments(source_format: str, target_format: str, dtype: str | None, target, layout: str) -> None:
    for name in (source_format, target_format):
        if name not in FORMAT_NAMES:
            raise ValueError(f"unknown format {name!r}: expected {', '.join(FORMAT_NAMES)}")
    if dtype is not None and dtype not in huggingface.WRITE_DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot be written: expected {' or '.join(huggingface.WRITE_DTYPES)}")
    if layout not in LAYOUTS or (target_format != ORBAX and layout != SCANNED):
        raise ValueError(
            f"layout {layout!r} cannot be written as {target_format}: {' and '.join(LAYOUTS)} are layouts of orbax; "
            "the other formats name the tensors of each block"
        )
    if not files.is_remote(target):
        check_free(target, target_format == gguf_file.NAME)


def _tokenizer(source, given, scratch: Path, config: ModelConfig, base) -> Tokenizer | None:
    tokenizer = find_tokenizer(source, scratch, base) if given is None else Tokenizer(given)
    if tokenizer is None:
        log.warning("warning: %s has no tokenizer, so none is written: name a .tiktoken file to add one", source)
    else:
        check_rows(tokenizer, config)
    return tokenizer


def _check_pad_token(table: Format, tokenizer: Tokenizer | None, source: Path) -> None:
    """Refuses a reward model without a tokenizer: other software finds the end of a row by the pad token alone."""
    if table.head == "scalar" and tokenizer is None:
        raise ValueError(
            f"format {table.name} needs the id of the pad token, and {source} has no tokenizer: name its .tiktoken file"
        )


def _warn_of_losses(table: Format, config: ModelConfig) -> None:
    known = {field.ours for field in table.fields}
    extension = [
        name
        for name, used, field in (
            ("dynamic NTK", config.use_dynamic_ntk, "use_dynamic_ntk"),
            ("LogN attention", config.use_logn, "use_logn"),
        )
        if used and field not in known
    ]
    if extension:
        log.warning(
            "warning: format %s has no %s, which this model has: the written model is the same up to its length limit "
            "of %d tokens (max_position_embeddings), and must not be used beyond",
            table.name,
            " and no ".join(extension),
            config.context_length,
        )
    if windows := [size for size in config.window_sizes or () if size]:
        log.warning(
            "warning: format %s has no window attention, which inference with this model uses (window_sizes, from %d "
            "tokens): the written model attends to everything, as in training, and its length limit is %d tokens",
            table.name,
            min(windows),
            config.context_length,
        )


def _external_config(table: Format, weights: Weights, dtype: str, tokenizer: Tokenizer | None) -> dict:
    endoftext = tokenizer.endoftext_id if tokenizer else None
    return huggingface.external_config(table, weights.config, dtype, endoftext, weights.position_limit)


def _write_external(
    table: Format,
    weights: Weights,
    folder: Path,
    dtype: str,
    max_shard_size: int,
    tokenizer: Tokenizer | None,
    checksums: Checksums,
    progress: bool,
) -> None:
    folder.mkdir()
    config = weights.config
    if tokenizer:
        if table.head == "tokens":
            generation = huggingface.generation_config(table, config, tokenizer.endoftext_id, tokenizer.im_end_id)
            files.write_json(folder / huggingface.GENERATION_FILE, generation)
        write_tokenizer(folder, tokenizer, config.context_length, config.vocab_size, config.vision is not None)
    tensors = external_tensors(table, config)
    kind = huggingface.numpy_dtype(dtype)
    with contextlib.closing(assembled(weights, [(tensor, kind) for tensor in tensors])) as arrays:
        huggingface.write_safetensors(folder, tensors, arrays, dtype, max_shard_size, checksums, progress)
