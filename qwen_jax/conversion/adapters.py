"""LoRA adapters in the layout of peft: adapter_config.json and adapter_model.safetensors, beside a base model.

peft writes the matrices of a linear layer as `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] below
`base_model.model.` and the layer's own name; layers that were trained whole (`modules_to_save`) are there, too.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax import files
from qwen_jax.conversion import huggingface
from qwen_jax.conversion.checksums import Checksums
from qwen_jax.conversion.external import StoredTensor, listing
from qwen_jax.conversion.mapping import (
    QWEN,
    QWEN2,
    QWEN2_REWARD,
    ExternalTensor,
    TensorMapping,
    Weights,
    external_shape,
    from_external,
    is_stacked,
    parameter_shapes,
    to_external,
)
from qwen_jax.conversion.run_folder import RunFolder
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.lora import PROJECTIONS, LoraConfig

NAME = "peft"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {"CAUSAL_LM": "tokens", "SEQ_CLS": "scalar"}
# Parameters that can be trained whole beside an adapter; peft names their layers in `modules_to_save`.
SCORE = QWEN2_REWARD.tensors[-1]
WHOLE = ("token_embedding", "output", "score")
# peft's default of both, for a file that leaves them out.
DEFAULT_RANK = DEFAULT_ALPHA = 8
# Values of init_lora_weights with which peft takes the first adapter out of the kernels, in training and at each
# loading: base and adapter alone are then another model. An adapter that it converted on saving says True instead.
ALTERING_STARTS = re.compile(r"(pissa|corda|olora|loftq).*", re.IGNORECASE)
# Fields of adapter_config.json with values that ask for something else than the product of two matrices.
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_bdlora": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter lies: the tensor, its first row in it, the layout, and which of the two matrices it is."""

    tensor: str
    start: int
    layout: str
    kind: str


def _adapted(table) -> list[TensorMapping]:
    """The tensors of a format that an adapter can stand beside."""
    return [mapping for mapping in table.tensors if _projection(mapping.parts[0]) in PROJECTIONS]


def _projection(path: str) -> str | None:
    """`up` of layers/mlp/up/kernel; None for other parameters."""
    found = re.fullmatch(r"layers/\w+/(\w+)/kernel", path)
    return found[1] if found else None


def _layer_name(mapping: TensorMapping, layer: int | None) -> str:
    return PREFIX + mapping.external.format(layer=layer).removesuffix(".weight")


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """(the adapter, without its targets; head of the model) of adapter_config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it asks for something that this model does not compute; the message names the field.
    """
    path = folder / CONFIG_FILE
    content = huggingface.read_json(path)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {content.get('peft_type')!r}, only LORA is read: merge it with peft")
    for field, plain in PLAIN.items():
        if (value := content.get(field)) not in (None, plain, []):
            raise ValueError(
                f"{path}: {field} is {value!r}, which is not computed here (supported: {plain!r}): merge it with "
                f"peft's merge_and_unload, and read the result"
            )
    if ALTERING_STARTS.fullmatch(str(start := content.get("init_lora_weights"))):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, with which peft changes the kernels of the base, too: merge it "
            f"with peft's merge_and_unload, and read the result"
        )
    task = content.get("task_type") or "CAUSAL_LM"
    if task not in TASKS:
        raise ValueError(f"{path}: task_type is {task!r}, expected {' or '.join(TASKS)}")
    rank, alpha = content.get("r", DEFAULT_RANK), content.get("lora_alpha", DEFAULT_ALPHA)
    try:
        if content.get("use_rslora"):  # arXiv 2312.03732: alpha / sqrt(rank)
            alpha = alpha * math.sqrt(rank)
        return LoraConfig(rank, alpha, dropout=content.get("lora_dropout") or 0.0), TASKS[task]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def base_folder(folder: Path, given: str | os.PathLike | None = None) -> Path:
    """The folder of an adapter's base model: `given`, or the one that adapter_config.json names, as peft resolves it.

    Raises:
      FileNotFoundError: it is no file or folder of this machine.
    """
    named = given or huggingface.read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not named or not files.as_path(named).exists():
        raise FileNotFoundError(
            f"{folder} holds a LoRA adapter of {named or 'an unnamed model'}, which is no folder here: name the folder "
            f"of its base (--base of tools/convert_checkpoint.py, or base_model_name_or_path in {CONFIG_FILE})"
        )
    return files.as_path(named)


class AdapterFolder:
    """A base model with an adapter that lies in a folder; a `Weights` of mapping.py.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the two do not fit, or the adapter is of a kind that is not computed here; the message names the field
        or the tensor.
    """

    dtype = "float32"

    def __init__(self, folder: Path, base: Weights):
        self.folder, self._base, self.position_limit = folder, base, base.position_limit
        lora, head = read_adapter_config(folder)
        if base.config.lora is not None:
            raise ValueError(f"the base of {folder} has adapters of its own: merge them first (convert it to qwen2)")
        if not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}: save the adapter as safetensors")
        self._stored = huggingface.read_header(folder / WEIGHTS_FILE)
        table = QWEN if any(name.startswith(PREFIX + "transformer.") for name in self._stored) else QWEN2
        layers = base.config.num_layers
        self._places = self._whole_places(table) | self._adapter_places(table, layers)
        if head == "scalar" and ("score", None) not in self._places and base.config.head != "scalar":
            raise ValueError(
                f"{folder} is of task SEQ_CLS and {WEIGHTS_FILE} has no {PREFIX}{SCORE.external}: the trained head is "
                f"lost; save the adapter with modules_to_save ['score']"
            )
        if base.config.tie_embeddings and {("output", None), ("token_embedding", None)} & self._places.keys():
            raise ValueError(
                f"{folder} holds an embedding or lm_head of its own, and its base ties the two: untie the base first"
            )
        self._refuse_unknown()
        targets = {_projection(path.replace("/lora_a", "/kernel")) for path, _ in self._places if "/lora_a" in path}
        if not targets:
            raise ValueError(f"{folder / WEIGHTS_FILE} holds no adapter of a projection: it changes nothing")
        lora = dataclasses.replace(lora, targets=tuple(targets))
        self.config, self._rank = dataclasses.replace(base.config, lora=lora, head=head), lora.rank
        self._check()

    def _whole_places(self, table) -> dict[tuple[str, int | None], _Place]:
        mappings = [mapping for mapping in (*table.tensors, SCORE) if mapping.parts[0] in WHOLE]
        return {
            (mapping.parts[0], None): _Place(PREFIX + mapping.external, 0, mapping.layout, "whole")
            for mapping in mappings
            if PREFIX + mapping.external in self._stored
        }

    def _adapter_places(self, table, layers: int) -> dict[tuple[str, int | None], _Place]:
        places = {}
        for mapping in _adapted(table):
            for layer in range(layers):
                name = _layer_name(mapping, layer)
                if f"{name}.lora_A.weight" not in self._stored and f"{name}.lora_B.weight" not in self._stored:
                    continue
                start, shapes = 0, parameter_shapes(self._base.config)
                for part in mapping.parts:
                    module = part.removesuffix("/kernel")
                    places[f"{module}/lora_a", layer] = _Place(f"{name}.lora_A.weight", 0, mapping.layout, "a")
                    places[f"{module}/lora_b", layer] = _Place(f"{name}.lora_B.weight", start, mapping.layout, "b")
                    start += external_shape(mapping.layout, shapes[part][1:])[0]
        return places

    def _refuse_unknown(self) -> None:
        known = {place.tensor for place in self._places.values()}
        if unknown := sorted(self._stored.keys() - known):
            hint = f" (names begin with {PREFIX!r})" if not any(name.startswith(PREFIX) for name in unknown) else ""
            raise ValueError(
                f"{self.folder / WEIGHTS_FILE} has {len(unknown)} tensors that belong to no adapted projection of the "
                f"base: {listing(unknown)}{hint}. Adapters of embeddings and lm_head are not computed here"
            )

    def _check(self) -> None:
        where, shapes = self.folder / WEIGHTS_FILE, parameter_shapes(self.config)
        rows: dict[str, tuple[int, ...]] = {}
        for path, shape in shapes.items():
            if "/lora_" not in path and (path, None) not in self._places:
                continue
            for layer in range(shape[0]) if is_stacked(path) else (None,):
                place = self._places.get((path, layer))
                if place is None or place.tensor not in self._stored:
                    raise ValueError(f"{where} has no {path} of layer {layer}: all layers must have the same adapters")
                found, expected = self._stored[place.tensor].shape, _shape(place, shape[0 if layer is None else 1 :])
                first = place.start + expected[0]
                rows[place.tensor] = max(rows.get(place.tensor, (0,)), (first, *expected[1:]))
                if found[1:] != expected[1:] or found[0] < first:
                    raise ValueError(
                        f"{where}: {place.tensor} is {list(found)}, expected {list(expected)} for rank "
                        f"{self._rank} and the shapes of the base"
                    )
        for name, expected in rows.items():
            if self._stored[name].shape[0] != expected[0]:
                raise ValueError(f"{where}: {name} is {list(self._stored[name].shape)}, expected {list(expected)}")

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """See `Weights.read`."""
        place = self._places.get((path, layer))
        if place is None:
            return self._base.read(path, layer, dtype)
        shape = parameter_shapes(self.config)[path][0 if layer is None else 1 :]
        expected = _shape(place, shape)
        stored = self._stored[place.tensor].read(place.start, place.start + expected[0])
        return from_external(place.layout, stored, shape) if place.kind == "whole" else stored.T.reshape(shape)


def _shape(place: _Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter's part of its tensor: [rank, in], [out, rank], or that of the layout."""
    if place.kind == "whole":
        return external_shape(place.layout, shape)
    return (shape[-1], math.prod(shape[:-1])) if place.kind == "a" else (math.prod(shape[1:]), shape[0])


def write_adapter(
    folder: Path, source: RunFolder, base: str | os.PathLike, dtype: str, checksums: Checksums, progress: bool
) -> None:
    """Writes the adapter of a run, with the parameters that were trained whole, for peft.

    Args:
      folder: a folder that does not exist.
      source: a run with adapters.
      base: name or folder of the base model, which `base_model_name_or_path` will say.
      dtype: of the tensors, "float32" or "bfloat16".

    Raises:
      ValueError: the run has no adapters, or trained what an adapter cannot hold.
    """
    config = source.config
    lora = config.lora
    if lora is None:
        raise ValueError("the source has no LoRA adapters (ModelConfig.lora): convert it to qwen2 instead")
    whole = sorted(path for path in source.trained if "/lora_" not in path)
    if config.tie_embeddings and "token_embedding" in whole:
        raise ValueError(
            "the run trained the embedding, which is also the output projection (tie_embeddings): peft would untie the "
            "two. Convert it to qwen2 (merged)"
        )
    if wrong := [path for path in whole if path not in WHOLE]:
        raise ValueError(
            f"an adapter cannot hold {listing(wrong)}, which this run trained, too: convert it to qwen2 (merged), or "
            f"freeze them (docs/how_to/parameter_groups.md)"
        )
    tensors = list(_tensors(config, whole))
    folder.mkdir()
    modules = {
        mapped: tensor.layer is None for tensor in tensors for mapped in [tensor.mapping.external.split(".")[-2]]
    }
    files.write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": "LORA",
            "task_type": next(task for task, head in TASKS.items() if head == config.head),
            "base_model_name_or_path": str(base),
            "r": lora.rank,
            "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": sorted(name for name, is_whole in modules.items() if not is_whole),
            "modules_to_save": sorted(name for name, is_whole in modules.items() if is_whole) or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "inference_mode": True,
        },
        indent=1,
    )
    total, kind = sum(math.prod(tensor.shape) for tensor in tensors), huggingface.numpy_dtype(dtype)
    with huggingface.progress_bar(total, dtype, progress) as bar:
        huggingface.write_file(
            folder / WEIGHTS_FILE,
            tensors,
            (np.ascontiguousarray(_external(source, tensor), kind) for tensor in tensors),
            dtype,
            checksums,
            bar,
        )


def _tensors(config: ModelConfig, whole: list[str]) -> Iterator[ExternalTensor]:
    """The tensors of an adapter file; a layer of None stands for a parameter that was trained whole."""
    assert config.lora is not None  # `write_adapter` has checked
    shapes = parameter_shapes(config)
    for mapping in _adapted(QWEN2):
        module = mapping.parts[0].removesuffix("/kernel")
        if module.rpartition("/")[2] not in config.lora.targets:
            continue
        for layer in range(config.num_layers):
            for kind, name in (("a", "lora_A"), ("b", "lora_B")):
                shape = _shape(_Place("", 0, mapping.layout, kind), shapes[f"{module}/lora_{kind}"][1:])
                part = dataclasses.replace(mapping, parts=(f"{module}/lora_{kind}",))
                yield ExternalTensor(f"{_layer_name(mapping, layer)}.{name}.weight", shape, part, layer)
    for mapping in (*QWEN2.tensors, SCORE):
        if mapping.parts[0] in whole:
            shape = external_shape(mapping.layout, shapes[mapping.parts[0]])
            yield ExternalTensor(PREFIX + mapping.external, shape, mapping, None)


def _external(source: Weights, tensor: ExternalTensor) -> np.ndarray:
    """The content of one of `_tensors`."""
    array = source.read(tensor.mapping.parts[0], tensor.layer)
    if tensor.layer is None:
        return to_external(tensor.mapping.layout, array)
    rank_last = tensor.mapping.parts[0].endswith("_a")
    return array.reshape(-1, array.shape[-1]).T if rank_last else array.reshape(array.shape[0], -1).T


def check_base(source: RunFolder, base: Weights, where: str | os.PathLike) -> None:
    """Compares the frozen parameters of a run with those of the base that its adapter will be loaded on.

    Raises:
      ValueError: a parameter differs; the adapter would compute something else there.
    """
    trained, shapes = source.trained, parameter_shapes(base.config)
    for path, shape in parameter_shapes(source.config).items():
        if path in trained:
            continue
        if shapes.get(path) != shape:
            raise ValueError(f"{where} is not the base of this run: {path} is {shapes.get(path)} there, {shape} here")
        for layer in range(shape[0]) if is_stacked(path) else (None,):
            ours, theirs = source.read(path, layer), base.read(path, layer)
            if not np.array_equal(ours, theirs.astype(ours.dtype)):
                raise ValueError(
                    f"{where} is not the base of this run: {path} differs"
                    f"{'' if layer is None else f' in layer {layer}'}. Name the model that the run started from"
                )


def read_again(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of an adapter."""
    stored: Mapping[str, StoredTensor] = huggingface.read_header(folder / WEIGHTS_FILE)
    for name, tensor in stored.items():
        yield name, tensor.read(0, tensor.shape[0])
