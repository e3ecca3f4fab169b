"""Loading a model from any known format, and writing it as another."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from qwen_jax.conversion import huggingface
from qwen_jax.conversion.mapping import (
    FORMATS,
    OutsideTensor,
    Weights,
    gather,
    outside_tensors,
    parameter_shapes,
    read_parameter,
)
from qwen_jax.conversion.tokenizer import RANKS_FILE, TOKENIZER_FILE, recover_ranks, write_tokenizer
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.training import checkpoints
from qwen_jax.training import weights as run_weights

log = logging.getLogger(__name__)

ORBAX = "orbax"
FORMAT_NAMES = (ORBAX, *FORMATS)


class RunFolder:
    """The parameters of a run folder (or of one of its steps), restored one at a time; a `Weights` of mapping.py.

    Raises:
      ValueError: the folder holds no checkpoint, or, from `read`, one that cannot be read.
    """

    dtype = "float32"

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path).absolute()
        steps = checkpoints.saved_steps(self._path)
        inside_run = self._path.parent.name == checkpoints.CHECKPOINTS
        self.config = checkpoints.read_config(self._path.parent.parent if inside_run else self._path)
        if steps:
            # A run that goes on must not change the step between two parameters.
            self._path = self._path / checkpoints.CHECKPOINTS / str(max(steps))
        self._kept: dict[str, np.ndarray] = {}

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """See `Weights.read`. A stacked parameter is kept from its first block to its last."""
        array = self._kept.pop(path, None)
        if array is None:
            array = self._restore(path)
        if layer is None:
            return array
        if layer + 1 < self.config.num_layers:
            self._kept[path] = array
        return array[layer]

    def _restore(self, path: str) -> np.ndarray:
        place = SingleDeviceSharding(jax.devices("cpu")[0])
        wanted = {
            # An ellipsis tells Orbax to leave a parameter where it is.
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) if name == path else ...
            for name, shape in parameter_shapes(self.config).items()
        }
        restored = run_weights.restore_params(self._path, unflatten_dict(wanted, sep="/"))
        return np.asarray(flatten_dict(restored, sep="/")[path])


def detect_format(path: str | os.PathLike) -> str:
    """The format of a folder, from what is in it: "orbax", "qwen" or "qwen2".

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it is none of these.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: name a run folder, or one with a {huggingface.CONFIG_FILE}")
    if (path / huggingface.CONFIG_FILE).is_file():
        return huggingface.format_of(path).name
    if (path / checkpoints.CONFIG_FILE).is_file() or path.absolute().parent.name == checkpoints.CHECKPOINTS:
        return ORBAX
    raise ValueError(
        f"{path} holds no model: it has neither {checkpoints.CONFIG_FILE} (a run folder) nor {huggingface.CONFIG_FILE} "
        f"(format {' or '.join(FORMATS)})"
    )


def load_pretrained(path: str | os.PathLike, dtype: str = "float32") -> tuple[Qwen, dict]:
    """The model of a folder in any known format, for training, evaluation or generation.

    Args:
      path: a run folder (or the folder of one of its steps), or a folder in format qwen or qwen2.
      dtype: compute dtype of the model, "float32" or "bfloat16".

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` takes int32 [batch, length] to float32 logits
      [batch, length, vocab_size]. Parameters are float32 jax arrays, layers stacked.

    Raises:
      FileNotFoundError, ValueError: naming the file, field or tensor that is wrong.
    """
    if (found := detect_format(path)) == ORBAX:
        config, tree = run_weights.load_params(path)
        return Qwen(dataclasses.replace(config, dtype=dtype)), jax.tree.map(jnp.asarray, tree)
    weights = huggingface.SafetensorsFolder(path, FORMATS[found])
    model = Qwen(dataclasses.replace(weights.config, dtype=dtype))
    # On a terminal only: this is a library call.
    names = tqdm(parameter_shapes(weights.config), desc="parameters", disable=None)
    return model, unflatten_dict({name: jnp.asarray(read_parameter(weights, name)) for name in names}, sep="/")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that a folder in any known format carries.

    Raises:
      FileNotFoundError, ValueError: the folder is no model, has no tokenizer, or not Qwen's.
    """
    in_run = detect_format(path) == ORBAX
    with tempfile.TemporaryDirectory() as scratch:
        ranks = run_weights.tokenizer_path(path) if in_run else recover_ranks(path, scratch)
        if ranks is None:
            wanted = checkpoints.TOKENIZER_FILE if in_run else f"{RANKS_FILE} or {TOKENIZER_FILE}"
            raise FileNotFoundError(f"{path} has no tokenizer: put the one it was trained with there as {wanted}")
        return Tokenizer(ranks)


def convert(
    source_format: str,
    source: str | os.PathLike,
    target_format: str,
    target: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Writes the model of one folder as a new folder, with its tokenizer.

    The numbers are unchanged unless `dtype` rounds them. A log warning says what the target format cannot express.

    Args:
      source_format, target_format: "orbax" (our run folder), "qwen" (QWenLMHeadModel) or "qwen2" (Qwen2ForCausalLM).
      source: the folder to read; for orbax a run folder (newest step) or the folder of one step.
      target: the folder to write; must not exist, or be empty. It appears whole, or not at all.
      dtype: of the written weights, "float32" or "bfloat16". None: that of the source, and float32 from orbax. Run
        folders are always float32.
      max_shard_size: bytes of one safetensors file, as a number or as in "5GB".
      tokenizer: a .tiktoken file. None: the one that the source has, if any.
      progress: whether to show bars.

    Returns:
      The absolute path of `target`.

    Raises:
      FileNotFoundError, ValueError: naming what is wrong in the arguments, the source or the target; OSError: from
        the file system. Nothing is written then.
    """
    target = Path(target).absolute()
    shard_size = huggingface.parse_size(max_shard_size)
    _check_arguments(source_format, target_format, dtype, target)
    weights = _open(source_format, source)
    if target_format != ORBAX:
        tensors = outside_tensors(FORMATS[target_format], weights.config)
    with _staged(target) as (scratch, result):
        ranks = _tokenizer(source_format, source, tokenizer, scratch, weights.config)
        if target_format == ORBAX:
            names = tqdm(parameter_shapes(weights.config), desc="parameters", disable=not progress)
            params = unflatten_dict({name: read_parameter(weights, name) for name in names}, sep="/")
            run_weights.save_params(result, weights.config, params, ranks.path if ranks else None)
        else:
            _write_outside(target_format, weights, tensors, result, dtype or weights.dtype, shard_size, ranks, progress)
    return target


def _check_arguments(source_format: str, target_format: str, dtype: str | None, target: Path) -> None:
    for name in (source_format, target_format):
        if name not in FORMAT_NAMES:
            raise ValueError(f"unknown format {name!r}: expected {', '.join(FORMAT_NAMES)}")
    if dtype is not None and dtype not in huggingface.WRITE_DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot be written: expected {' or '.join(huggingface.WRITE_DTYPES)}")
    if target_format == ORBAX and dtype not in (None, "float32"):
        raise ValueError(f"run folders hold float32 parameters: dtype {dtype!r} cannot be written to one, leave it out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: choose another target, or remove it")


def _open(name: str, path: str | os.PathLike) -> Weights:
    if (found := detect_format(path)) != name:
        raise ValueError(f"{path} is a folder of format {found}, not {name}")
    if name == ORBAX:
        return RunFolder(path)
    return huggingface.SafetensorsFolder(path, FORMATS[name])


def _tokenizer(source_format, source, given, scratch: Path, config: ModelConfig) -> Tokenizer | None:
    if given is None:
        given = run_weights.tokenizer_path(source) if source_format == ORBAX else recover_ranks(source, scratch)
    if given is None:
        log.warning("warning: %s has no tokenizer, so none is written: name a .tiktoken file to add one", source)
        return None
    tokenizer = Tokenizer(given)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{given} has {tokenizer.vocab_size} ids, but the model's vocab_size is {config.vocab_size}: this is the "
            "tokenizer of another model; name the right .tiktoken file"
        )
    return tokenizer


def _write_outside(
    target_format: str,
    weights: Weights,
    tensors: list[OutsideTensor],
    folder: Path,
    dtype: str,
    max_shard_size: int,
    tokenizer: Tokenizer | None,
    progress: bool,
) -> None:
    table, config = FORMATS[target_format], weights.config
    if (config.use_dynamic_ntk or config.use_logn) and "use_dynamic_ntk" not in {field.ours for field in table.fields}:
        log.warning(
            "warning: format %s has no dynamic NTK and no LogN attention, which this model has: the written model is "
            "the same up to its length limit of %d tokens (max_position_embeddings), and must not be used beyond",
            target_format, config.max_length,
        )
    folder.mkdir()
    endoftext = tokenizer.endoftext_id if tokenizer else None
    outside = huggingface.outside_config(table, config, dtype, endoftext)
    huggingface.write_json(folder / huggingface.CONFIG_FILE, outside)
    if tokenizer:
        generation = huggingface.generation_config(table, config, endoftext, tokenizer.im_end_id)
        huggingface.write_json(folder / huggingface.GENERATION_FILE, generation)
        write_tokenizer(folder, tokenizer, config.max_length)
    huggingface.write_safetensors(
        folder, tensors, lambda tensor: gather(weights, tensor), dtype, max_shard_size, progress
    )


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[tuple[Path, Path]]:
    """A hidden folder beside `target`, and in it the name of what becomes `target` when the block ends well.

    A killed conversion leaves the hidden folder, which the next one to the same target clears. The lock tells that
    from a conversion that is still running.
    """
    stage = target.with_name(f".{target.name}.converting")
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    stage.mkdir(exist_ok=True)
    lock = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another conversion to {target} is running: wait, or choose another target") from error
        try:
            _clear(stage)
            yield stage, stage / "result"
            (stage / "result").rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(lock)
        if not target.exists():
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: someone else has put something there
                    folder.rmdir()


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
