"""Folders in the layout of Hugging Face: config.json, generation_config.json, safetensors; read and written by numpy.

Tensors are read and written one at a time with plain file reads. A memory map would do as well, but its pages count as
memory of the process, and a 7B checkpoint must convert in much less than its size.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.conversion import visual
from qwen_jax.conversion.checksums import Checksums
from qwen_jax.conversion.external import READ_DTYPES, ExternalWeights, StoredTensor, listing
from qwen_jax.conversion.mapping import FORMATS, REQUIRED, ExternalTensor, Format
from qwen_jax.files import objects
from qwen_jax.models.config import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WRITE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
# What released configurations with context extension say of max_position_embeddings, by hidden size, layers and
# seq_length; no rule gives these. (Where there is no extension, all say seq_length.)
RELEASED_LIMITS = {(2048, 24, 8192): 8192, (4096, 32, 8192): 32768, (5120, 40, 2048): 8192}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number.

    Raises:
      ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if not match or match[2].upper() not in _UNITS or (found := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise ValueError(f"max_shard_size {size!r} is not a size: write it as 5GB, 500MB, 1GiB or a number of bytes")
    return found


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
      FileNotFoundError, ValueError: naming the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: the folder must hold it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def format_of(folder: Path) -> Format:
    """The format that a folder's config.json names.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it names another architecture.
    """
    content = read_json(folder / CONFIG_FILE)
    architectures = content.get("architectures") or []
    for table in FORMATS.values():
        # Some folders name no architecture; those that do are taken at their word.
        if table.architecture in architectures or (not architectures and content.get("model_type") == table.model_type):
            return table
    raise ValueError(
        f"{folder / CONFIG_FILE}: architectures {architectures}, model_type {content.get('model_type')!r} is not one "
        f"that can be read: expected {' or '.join(table.architecture for table in FORMATS.values())}"
    )


def read_config(folder: Path, table: Format) -> ModelConfig:
    """The model configuration of a folder in format `table`.

    `ModelConfig.dtype`, `remat` and `attention_kernel`, which external formats do not have, are its defaults.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is of another format, a field is missing, or it asks for a model that ours does not compute.
    """
    path = folder / CONFIG_FILE
    if (found := format_of(folder)) is not table:
        raise ValueError(f"{path} is a {found.architecture} (format {found.name}), not {table.architecture}")
    content = read_json(path)
    values = {field.ours: _read_field(path, content, field) for field in table.fields}
    if table.rope_parameters:
        values["rope_theta"] = _read_rope(path, content)
    _refuse_unsupported(path, content, table)
    if values.get("head_dim") is None and values["num_heads"] > 0:
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    values["head"] = table.head
    if content.get("visual") is not None and table.name == "qwen":
        values["vision"] = visual.read_config(path, content["visual"], values["hidden_size"])
    try:
        return ModelConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_field(path: Path, content: dict, field):
    for name in (*field.earlier, field.name):
        if content.get(name) is not None:
            value = content[name]
            break
    else:
        if field.default is REQUIRED:
            raise ValueError(f"{path} has no {' or '.join((field.name, *field.earlier))}: is it a whole config.json?")
        return field.default
    kinds = {bool: ((bool,), "true or false"), float: ((int, float), "a number")}
    allowed, described = kinds.get(_FIELD_TYPES[field.ours], ((int,), "an integer"))
    if type(value) not in allowed:  # not isinstance: for Python, true is an integer
        raise ValueError(f"{path}: {name} is {value!r}, expected {described}")
    if field.factor != 1:
        if value % field.factor:
            raise ValueError(f"{path}: {name} is {value}, expected a multiple of {field.factor}")
        value //= field.factor
    return float(value) if float in allowed else value


_FIELD_TYPES = {field.name: field.type for field in dataclasses.fields(ModelConfig)}


def _read_rope(path: Path, content: dict) -> float:
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(found := content.get(name) or {}, dict):
            raise ValueError(f"{path}: {name} is {found!r}, expected an object")
        rope |= found
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{path}: rope type {kind!r} (rope_parameters or rope_scaling) is not supported: only 'default', the "
            "unscaled rotation, is computed here; use a model, or a configuration, without scaling"
        )
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or theta <= 0:
        raise ValueError(f"{path}: rope_theta is {theta!r}, expected a positive number")
    return float(theta)


def _refuse_unsupported(path: Path, content: dict, table: Format) -> None:
    wrong = [
        f"{name} is {content[name]!r}, supported is {value!r}"
        for name, value in table.fixed.items()
        if content.get(name) is not None and content[name] != value
    ]
    if windowed := sorted(set(content.get("layer_types") or ()) - {"full_attention"}):
        wrong.append(f"layer_types has {', '.join(windowed)}, supported is 'full_attention'")
    labels = len(content["id2label"]) if content.get("id2label") else content.get("num_labels", 2)
    if table.head == "scalar" and labels != 1:
        wrong.append(f"it has {labels} labels (id2label), supported is 1")
    if content.get("quantization_config"):
        wrong.append("quantization_config is set, supported are unquantized weights")
    if wrong:
        raise ValueError(f"{path} asks for what this model does not compute: {'; '.join(wrong)}")


def external_config(
    table: Format, config: ModelConfig, dtype: str, endoftext_id: int | None, position_limit: int | None = None
) -> dict:
    """The content of config.json.

    Args:
      dtype: dtype of the weights, "float32" or "bfloat16".
      endoftext_id: id of the token that ends a document, or None if the tokenizer is unknown.
      position_limit: max_position_embeddings of format qwen, where it is not the training length. None: that of the
        released model of this size, and for other sizes the limit of our own generation.
    """
    content = {"architectures": [table.architecture], "model_type": table.model_type}
    for field in table.fields:
        value = getattr(config, field.ours)
        if field.ours == "head_dim" and field.default is None and value * config.num_heads == config.hidden_size:
            continue
        if field.ours == "rope_theta" and float(value).is_integer():
            value = int(value)
        content[field.name] = value * field.factor if field.factor != 1 else value
    if config.vision is not None:
        content["visual"] = visual.external_config(config.vision, config.hidden_size)
    content.update(table.constants)
    content["torch_dtype"] = dtype  # the name that both transformers 4 and 5 read
    if table.rope_parameters:
        content["rope_theta"] = config.rope_theta  # transformers 4; version 5 reads the next line
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    else:
        size = (config.hidden_size, config.num_layers, config.context_length)
        released = RELEASED_LIMITS.get(size) if config.use_dynamic_ntk else None
        content["max_position_embeddings"] = position_limit or released or config.inference_length
        content |= {"bf16": dtype == "bfloat16", "fp16": False, "fp32": dtype == "float32"}
    if endoftext_id is not None:
        content |= {"bos_token_id": endoftext_id, "eos_token_id": endoftext_id}
    if table.head == "scalar":
        # transformers scores a batch of several rows only with this id, and reads the score before the padding.
        content["pad_token_id"] = endoftext_id
    return content


def generation_config(table: Format, config: ModelConfig, endoftext_id: int, im_end_id: int) -> dict:
    """The content of generation_config.json: generation stops at either id."""
    content = {"bos_token_id": endoftext_id, "eos_token_id": [im_end_id, endoftext_id], "pad_token_id": endoftext_id}
    if table.name == "qwen":
        content |= {"chat_format": "chatml", "max_window_size": config.context_length}
    return content


class SafetensorsFolder(ExternalWeights):
    """The weights of a folder in an external format.

    Raises:
      FileNotFoundError: config.json, the weights, or a file that their index names is missing.
      ValueError: the configuration is not supported, a file is damaged, or as `ExternalWeights`.
    """

    def __init__(self, folder: str | os.PathLike, table: Format):
        folder = files.as_path(folder)
        config = read_config(folder, table)
        limit = None if table.rope_parameters else read_json(folder / CONFIG_FILE).get("max_position_embeddings")
        self.position_limit = limit if type(limit) is int else None
        super().__init__(folder, table, config, _stored_tensors(folder))


def read_again(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a folder, file by file."""
    for name, stored in _stored_tensors(folder).items():
        yield name, stored.read(0, stored.shape[0])


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name to place of every tensor of a folder, from the headers of its files."""
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        hint = f"; it has {listing(others)}: save the model as safetensors first" if others else ""
        raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names: download it again")
    files = sorted(set(names.values()))
    absent = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index} names {len(absent)} of {len(files)} files that are not in the folder: {listing(absent)}. "
            "Download them again"
        )
    headers = {file: read_header(folder / file) for file in files}
    lost = [f"{name} in {file}" for name, file in names.items() if name not in headers[file]]
    if lost:
        raise ValueError(f"{index} names tensors that are not in their file: {listing(lost)}. Download the files again")
    # Tensors that the index does not name are kept: the check against the configuration will call them unexpected.
    everything = {name: place for header in headers.values() for name, place in header.items()}
    return everything | {name: headers[file][name] for name, file in names.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name to place of every tensor of a safetensors file.

    Raises:
      ValueError: it is damaged.
    """
    if files.is_remote(file):
        return _read_remote_header(file)
    try:
        # The library's own checks: sizes, overlaps, and that the data is as long as the header says.
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        raise _damaged(file, file.stat().st_size, error) from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return _places(file, header, length)


def _read_remote_header(file: Path) -> dict[str, StoredTensor]:
    """As `read_header`, with the checks of the library, which reads local files only."""
    found = objects.head(file)
    size, version = found["size"], found["e_tag"]
    try:
        length = int.from_bytes(objects.get(file, (0, min(8, size)), version), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(objects.get(file, (8, 8 + length), version))
        places = _places(file, header, length, version)
        end = 0
        for name in sorted(places, key=lambda name: header[name]["data_offsets"]):
            first, last = header[name]["data_offsets"]
            dtype = READ_DTYPES.get(places[name].dtype)
            if first != end or (dtype and last - first != math.prod(places[name].shape) * dtype.itemsize):
                raise ValueError(f"{name} lies at bytes {first} to {last}, expected {end}")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(file, size, error) from error
    return places


def _places(file, header: dict, length: int, version: str | None = None) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0], version)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _damaged(file, size: int, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or was not downloaded whole ({size} bytes; {error}): download it again")


def write_safetensors(
    folder: Path,
    tensors: Sequence[ExternalTensor],
    arrays: Iterator[np.ndarray],
    dtype: str,
    max_shard_size: int,
    checksums: Checksums,
    progress: bool,
) -> None:
    """Writes tensors one after the other, with an index if they need more than one file.

    Args:
      folder: an existing folder.
      tensors: the tensors, in the order of writing.
      arrays: their contents in this order, contiguous and in this dtype; each is taken just before it is written.
      dtype: "float32" or "bfloat16".
      max_shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
      checksums: records every tensor.
      progress: whether to show a progress bar.
    """
    itemsize = numpy_dtype(dtype).itemsize
    shards: list[list[ExternalTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    with progress_bar(total, dtype, progress) as bar:
        for file, shard in zip(names, shards, strict=True):
            write_file(folder / file, shard, arrays, dtype, checksums, bar)
    if len(shards) > 1:
        where = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        metadata = {"total_parameters": total, "total_size": total * itemsize}
        files.write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of "float32" or "bfloat16"."""
    return READ_DTYPES[WRITE_DTYPES[dtype]]


def progress_bar(numbers: int, dtype: str, shown: bool) -> tqdm:
    """A bar of the bytes of so many numbers."""
    size = numbers * numpy_dtype(dtype).itemsize
    return tqdm(total=size, unit="B", unit_scale=True, desc="weights", disable=not shown)


def write_file(
    path: Path,
    tensors: Sequence[ExternalTensor],
    arrays: Iterator[np.ndarray],
    dtype: str,
    checksums: Checksums,
    bar: tqdm,
) -> None:
    """Writes one safetensors file; arguments as in `write_safetensors`."""
    kind = WRITE_DTYPES[dtype]
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * numpy_dtype(dtype).itemsize
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts at a multiple of eight bytes
    with files.new_stream(path) as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            array = next(arrays)
            checksums.add(tensor.name, array)
            stream.write(array.reshape(-1).view(np.uint8).data)
            bar.update(array.nbytes)
            del array  # the next one may be as large
