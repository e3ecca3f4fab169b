"""Opening and loading a model from any known format."""

import dataclasses
import math
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.checkpoints import run_folder
from qwen_jax.checkpoints.arrays import PARAMETER_TREES, PIECE_BYTES, step_folder, tokenizer_path
from qwen_jax.conversion import adapters, gguf_file, huggingface
from qwen_jax.conversion.mapping import (
    FORMATS,
    LAYER_PREFIX,
    Weights,
    copy_moved,
    is_stacked,
    parameter_shapes,
    read_parameter,
)
from qwen_jax.conversion.merging import without_adapters
from qwen_jax.conversion.run_folder import SCANNED, RunFolder
from qwen_jax.conversion.tokenizer import RANKS_FILE, TOKENIZER_FILE, VOCABULARY_FILE, here, recover_ranks
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.files import PathLike, as_path
from qwen_jax.models.build import build_model
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import tree_shardings

ORBAX = "orbax"
FORMAT_NAMES = (ORBAX, *FORMATS, gguf_file.NAME, adapters.NAME)


def detect_format(path: PathLike) -> str:
    """The format of a folder, found by its files: "orbax", "qwen", "qwen2" or "peft"; of a file, "gguf".

    Raises:
      FileNotFoundError: no such folder.
      ValueError: the folder has none of these formats.
    """
    path = as_path(path)
    if gguf_file.is_gguf(path):
        return gguf_file.NAME
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: name a run folder, or one with a {huggingface.CONFIG_FILE}")
    if (path / adapters.CONFIG_FILE).is_file():
        return adapters.NAME
    if (path / huggingface.CONFIG_FILE).is_file():
        return huggingface.format_of(path).name
    if (path / run_folder.CONFIG_FILE).is_file() or path.absolute().parent.name == run_folder.CHECKPOINTS:
        return ORBAX
    raise ValueError(
        f"{path} holds no model: it has neither {run_folder.CONFIG_FILE} (a run folder) nor {huggingface.CONFIG_FILE} "
        f"(format {' or '.join(FORMATS)})"
    )


def open_weights(path: PathLike, name: str | None = None, base: PathLike | None = None) -> Weights:
    """The parameters of a folder, read one at a time; those of a model with LoRA adapters are not merged.

    Args:
      name: the format that the folder must have; None: any.
      base: the base model of an adapter of peft; None: the folder that the adapter names.

    Raises:
      FileNotFoundError, ValueError: the message names the wrong file, field or tensor.
    """
    path = as_path(path)
    if (found := detect_format(path)) != (name or found):
        raise ValueError(f"{path} is a folder of format {found}, not {name}")
    if found == gguf_file.NAME:
        return gguf_file.GgufFile(path)
    if found == adapters.NAME:
        return adapters.AdapterFolder(path, open_weights(adapters.base_folder(path, base)))
    return RunFolder(path) if found == ORBAX else huggingface.SafetensorsFolder(path, FORMATS[found])


def weight_files(path: PathLike) -> list[Path]:
    """The files that hold the parameters of a model in any known format, sorted.

    Raises:
      FileNotFoundError, ValueError: the path is no model.
    """
    path, found = as_path(path), detect_format(path)
    if found == gguf_file.NAME:
        return [path]
    if found == adapters.NAME:
        return [path / adapters.WEIGHTS_FILE, *weight_files(adapters.base_folder(path))]
    if found != ORBAX:
        return sorted(path.glob("*.safetensors"))
    step = step_folder(path)
    return sorted(file for tree in PARAMETER_TREES for file in (step / tree).rglob("*") if file.is_file())


def read_model_config(path: PathLike) -> ModelConfig:
    """The ModelConfig of a model in any known format; reads no weights.

    Fields that an external format lacks (compute dtype, remat policy, attention kernel) have their defaults.

    Raises:
      FileNotFoundError, ValueError: the message names the file and the wrong field.
    """
    path, found = as_path(path), detect_format(path)
    if found in (gguf_file.NAME, adapters.NAME):
        return open_weights(path).config
    if found != ORBAX:
        return huggingface.read_config(path, FORMATS[found])
    in_step = path.absolute().parent.name == run_folder.CHECKPOINTS
    return run_folder.read_config(path.absolute().parent.parent if in_step else path)


def load_pretrained(path: PathLike, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Qwen, dict]:
    """The model of a folder in any known format, for training, evaluation or generation.

    LoRA adapters are merged into their kernels in float32, so that this is the model that an export is.

    Args:
      path: a run folder (or the folder of one of its steps), a folder in format qwen, qwen2 or peft, or a GGUF file.
      dtype: compute dtype of the model, "float32" or "bfloat16".
      mesh: devices over which the parameters are sharded as in training. Host memory holds one layer of one
        parameter. None: the default device.

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` takes int32 [batch, length] to float32 logits
      [batch, length, vocab_size]. Parameters are float32 jax arrays, layers stacked.

    Raises:
      FileNotFoundError, ValueError: the message names the wrong file, field or tensor, or the one that the mesh does
        not divide.
    """
    path = as_path(path)
    weights = without_adapters(open_weights(path))
    model = build_model(dataclasses.replace(weights.config, dtype=dtype))
    boxed = abstract_params(model)
    abstract = nn.meta.unbox(boxed)
    here = SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, abstract) if mesh is None else tree_shardings(boxed, mesh)
    if isinstance(weights, RunFolder) and weights.layout == SCANNED:
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        return model, weights.restore(placed)
    # On a terminal only: this is a library call.
    named = tqdm(flatten_dict(shardings, sep="/").items(), desc="parameters", disable=None)
    return model, unflatten_dict({name: place_parameter(weights, name, sharding) for name, sharding in named}, sep="/")


def load_for_decoding(path: PathLike, dtype: str = "float32") -> tuple[Qwen, dict]:
    """The model of a folder in any known format, as `Engine` keeps it on one device.

    The engine then shares the arrays and compiles no program to make them of others. Host memory holds one parameter,
    and of a stacked one that is stored by layers, a layer.

    Args:
      path, dtype: as in `load_pretrained`.

    Returns:
      (model, params): parameters in the compute dtype, `layers` a tuple of the parameters of each block.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`.
    """
    weights, device = without_adapters(open_weights(path)), jax.devices()[0]
    model = build_model(dataclasses.replace(weights.config, dtype=dtype))
    dtype = model.config.compute_dtype
    flat: dict[tuple[str, ...], jax.Array] = {}
    layers: list[dict] = [{} for _ in range(weights.config.num_layers)]
    for name, shape in tqdm(parameter_shapes(weights.config).items(), desc="parameters", disable=None):
        if not name.startswith(LAYER_PREFIX):
            flat[tuple(name.split("/"))] = jax.device_put(read_parameter(weights, name).astype(dtype), device)
            continue
        for index, layer in enumerate(layers):
            one = np.empty(shape[1:], dtype)
            copy_moved(weights.read(name, index), one)
            layer[tuple(name.removeprefix(LAYER_PREFIX).split("/"))] = jax.device_put(one, device)
    return model, {**unflatten_dict(flat), "layers": tuple(map(unflatten_dict, layers))}


def place_parameter(weights: Weights, path: str, sharding: Sharding, dtype=jnp.float32) -> jax.Array:
    """Reads a parameter onto its devices in `dtype`; a large stacked one layer by layer.

    Raises:
      ValueError: the parameter cannot be read.
    """
    shape = parameter_shapes(weights.config)[path]
    if not is_stacked(path) or 4 * math.prod(shape) <= PIECE_BYTES:
        return jax.device_put(read_parameter(weights, path).astype(dtype, copy=False), sharding)
    of_layer = sharding
    if isinstance(sharding, NamedSharding):
        # The axis of layers lies on no mesh axis.
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stacked = jnp.zeros(shape, dtype, device=sharding)
    put = jax.jit(lambda all, one, layer: all.at[layer].set(one), donate_argnums=0, out_shardings=sharding)
    for layer in range(shape[0]):
        one = np.empty(shape[1:], np.float32)
        copy_moved(weights.read(path, layer), one)
        stacked = put(stacked, jax.device_put(one.astype(dtype, copy=False), of_layer), layer)
    return stacked


def find_ranks(path: PathLike, scratch: Path, base: PathLike | None = None) -> Path | None:
    """The `.tiktoken` file of a model in any format, if necessary written into `scratch`; None: it has no tokenizer.

    An adapter of peft has that of its base model; `base` as in `open_weights`.

    Raises:
      FileNotFoundError, ValueError: the path is no model, or its tokenizer is not Qwen's.
    """
    path = as_path(path)
    found = detect_format(path)
    if found == ORBAX:
        ranks = tokenizer_path(path)
        return ranks and here(ranks, scratch)
    if found == gguf_file.NAME:
        with files.local_copy(path) as local:
            return gguf_file.recover_gguf_ranks(local, scratch)
    if found == adapters.NAME:
        return find_ranks(adapters.base_folder(path, base), scratch)
    return recover_ranks(path, scratch)


def find_tokenizer(path: PathLike, scratch: Path, base: PathLike | None = None) -> Tokenizer | None:
    """The tokenizer of a model in any format, or None; arguments and errors as in `find_ranks`."""
    ranks = find_ranks(path, scratch, base)
    if ranks is None:
        return None
    return Tokenizer(ranks, path if ranks.parent == scratch else None)


def check_rows(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuses a tokenizer with more ids of text and ChatML than the model has rows, or with other tags of pictures.

    Raises:
      ValueError: the message has both numbers.
    """
    if config.vision is not None:
        tag = tokenizer.vision_tokens["<img>"]
        if tag != config.vision.image_start_id or tokenizer.vision_vocab_size > config.vocab_size:
            raise ValueError(
                f"<img> is id {tag} of {tokenizer.vision_vocab_size} in the tokenizer of {tokenizer.origin}, and id "
                f"{config.vision.image_start_id} of {config.vocab_size} in the model: this is the tokenizer of another "
                "model; name the right .tiktoken file"
            )
    if tokenizer.required_rows > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer.origin} has {tokenizer.required_rows} ids for text and chat, but the model's "
            f"vocab_size is {config.vocab_size}: this is the tokenizer of another model; name the right .tiktoken file"
        )


def load_tokenizer(path: PathLike) -> Tokenizer:
    """The tokenizer that a folder in any known format carries.

    Raises:
      FileNotFoundError, ValueError: the folder is no model, has no tokenizer, or not Qwen's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = find_tokenizer(path, Path(scratch))
        if tokenizer is None:
            in_run = detect_format(path) == ORBAX
            wanted = run_folder.TOKENIZER_FILE if in_run else f"{RANKS_FILE}, {TOKENIZER_FILE} or {VOCABULARY_FILE}"
            raise FileNotFoundError(f"{path} has no tokenizer: put the one it was trained with there as {wanted}")
        return tokenizer
