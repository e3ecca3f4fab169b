"""Tables of external formats: one per format, from our parameters and configuration fields to theirs and back.

A table names our parameters in each external tensor and the order of their axes. A layout is written as
`our axes -> their axes`, with `(a b)` for axes that the external format flattens into one; a layout only moves
numbers, so both directions are exact. A new external format is one more `Format` in `FORMATS`.
"""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from qwen_jax.models.build import build_model
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import abstract_params

REQUIRED = object()  # the default of a ConfigField that a config.json must have
COPY_BLOCK = 256
LAYER_PREFIX = "layers/"  # our parameters below it are stacked along a leading layer axis
VISION_LAYER_PREFIX = "vision/layers/"  # those of the image encoder, with its own number of layers

# Linear weights of the external formats are [out, in]. d: hidden width, h: heads, k: head_dim, f: FFN, v: vocabulary.
HEADS_IN = "d h k -> (h k) d"
HEADS_BIAS = "h k -> (h k)"
HEADS_OUT = "h k d -> d (h k)"
FFN_IN = "d f -> f d"
FFN_OUT = "f d -> d f"
UNEMBED = "d v -> v d"
SCORE = "d o -> o d"  # o: the one output
EMBED = "v d -> v d"
VECTOR = "d -> d"
# Of the image encoder: i, j rows and columns of a patch, c: colors, n: query, key and value, e: features.
PATCHES = "i j c d -> d c i j"
INTERLEAVED = "d h n k -> (h n k) d"
INTERLEAVED_BIAS = "h n k -> (h n k)"
FEATURES = "d e -> d e"


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One external tensor, or one per layer.

    Attributes:
      external: its name; `{layer}` stands for the index of the block.
      parts: paths of our parameters, in their order along the first axis of the tensor.
      layout: order of the axes of each part.
    """

    external: str
    parts: tuple[str, ...]
    layout: str


@dataclasses.dataclass(frozen=True)
class ConfigField:
    """One field of an external config.json.

    Attributes:
      ours: field of `ModelConfig`.
      name: the external name.
      default: value for a file without the field; REQUIRED if the field must exist.
      earlier: names in older files; they win over `name` in a file with both.
      factor: the external value divided by ours.
    """

    ours: str
    name: str
    default: Any = REQUIRED
    earlier: tuple[str, ...] = ()
    factor: int = 1


@dataclasses.dataclass(frozen=True)
class Format:
    """One external format.

    Attributes:
      name: name of the format, for users.
      architecture, model_type: names of the format in config.json.
      tensors: its tensors.
      fields: fields of config.json with a field of `ModelConfig`.
      fixed: fields of config.json with the only value that our model supports; a missing field has this value.
      constants: further fields to write.
      refuse: lists the features of a `ModelConfig` that the format cannot express, a sentence each.
      redundant: pattern of names of buffers, which a checkpoint may hold and conversion ignores.
      tied_output: name of the output projection; checkpoints with tied embeddings may hold a copy under it.
      rope_parameters: whether the rotary base is in `rope_parameters` and `rope_theta` rather than in a ConfigField.
      head: `ModelConfig.head` of its models.
    """

    name: str
    architecture: str
    model_type: str
    tensors: tuple[TensorMapping, ...]
    fields: tuple[ConfigField, ...]
    fixed: Mapping[str, Any]
    constants: Mapping[str, Any]
    refuse: Callable[[ModelConfig], list[str]]
    redundant: str
    tied_output: str | None = None
    rope_parameters: bool = False
    head: str = "tokens"


def _kernels(*names: str) -> tuple[str, ...]:
    return tuple(f"layers/{name}/kernel" for name in names)


def _refuse_qwen(config: ModelConfig) -> list[str]:
    reasons = []
    if config.num_kv_heads != config.num_heads:
        reasons.append(f"grouped-query attention (num_kv_heads {config.num_kv_heads}, num_heads {config.num_heads})")
    if config.tie_embeddings:
        reasons.append("tied embeddings (tie_embeddings)")
    if not config.qkv_bias:
        reasons.append("projections without bias (qkv_bias False)")
    if config.num_heads * config.head_dim != config.hidden_size:
        product = f"num_heads * head_dim ({config.num_heads} * {config.head_dim})"
        reasons.append(f"{product} other than hidden_size ({config.hidden_size})")
    return reasons


def _refuse_qwen2(config: ModelConfig) -> list[str]:
    reasons = [] if config.qkv_bias else ["projections without bias (qkv_bias False)"]
    return [*reasons, "an image encoder (vision)"] if config.vision is not None else reasons


def _norm(external: str, ours: str) -> tuple[TensorMapping, TensorMapping]:
    """Weight and bias of a LayerNorm of the image encoder."""
    return (
        TensorMapping(f"transformer.visual.{external}.weight", (f"vision/{ours}/scale",), VECTOR),
        TensorMapping(f"transformer.visual.{external}.bias", (f"vision/{ours}/bias",), VECTOR),
    )


def _linear(external: str, ours: str, layout: str, bias_layout: str = VECTOR) -> tuple[TensorMapping, TensorMapping]:
    """Weight and bias of a linear layer of the image encoder."""
    return (
        TensorMapping(f"transformer.visual.{external}.weight", (f"vision/{ours}/kernel",), layout),
        TensorMapping(f"transformer.visual.{external}.bias", (f"vision/{ours}/bias",), bias_layout),
    )


_BLOCK = "transformer.resblocks.{layer}"
_RESAMPLED = tuple(f"vision/resampler/{name}" for name in ("query", "key", "value"))
# Tensors of the image encoder and the resampler of Qwen-VL (released visual.py): 18 and 12 for each block, 594 as
# released. Models without `ModelConfig.vision` have none of them.
VISUAL = (
    TensorMapping("transformer.visual.conv1.weight", ("vision/patch_embedding/kernel",), PATCHES),
    TensorMapping("transformer.visual.positional_embedding", ("vision/positions",), EMBED),
    *_norm("ln_pre", "input_norm"),
    *_norm(f"{_BLOCK}.ln_1", "layers/attention_norm"),
    *_linear(f"{_BLOCK}.attn.in_proj", "layers/query_key_value", INTERLEAVED, INTERLEAVED_BIAS),
    *_linear(f"{_BLOCK}.attn.out_proj", "layers/attention_output", HEADS_OUT),
    *_norm(f"{_BLOCK}.ln_2", "layers/mlp_norm"),
    *_linear(f"{_BLOCK}.mlp.c_fc", "layers/up", FFN_IN),
    *_linear(f"{_BLOCK}.mlp.c_proj", "layers/down", FFN_OUT),
    TensorMapping("transformer.visual.attn_pool.query", ("vision/resampler/queries",), EMBED),
    TensorMapping("transformer.visual.attn_pool.pos_embed", ("vision/resampler/positions",), EMBED),
    TensorMapping("transformer.visual.attn_pool.kv_proj.weight", ("vision/resampler/input/kernel",), FFN_IN),
    *_norm("attn_pool.ln_q", "resampler/query_norm"),
    *_norm("attn_pool.ln_kv", "resampler/input_norm"),
    TensorMapping(
        "transformer.visual.attn_pool.attn.in_proj_weight", tuple(f"{name}/kernel" for name in _RESAMPLED), HEADS_IN
    ),
    TensorMapping(
        "transformer.visual.attn_pool.attn.in_proj_bias", tuple(f"{name}/bias" for name in _RESAMPLED), HEADS_BIAS
    ),
    *_linear("attn_pool.attn.out_proj", "resampler/attention_output", HEADS_OUT),
    *_norm("ln_post", "output_norm"),
    TensorMapping("transformer.visual.proj", ("vision/output/kernel",), FEATURES),
)

# Tensors of QWenLMHeadModel as released in 2023 (github.com/QwenLM/Qwen). In its MLP w2 is the gate and w1 is not.
QWEN = Format(
    name="qwen",
    architecture="QWenLMHeadModel",
    model_type="qwen",
    tensors=(
        TensorMapping("transformer.wte.weight", ("token_embedding",), EMBED),
        TensorMapping("transformer.h.{layer}.ln_1.weight", ("layers/attention_norm/scale",), VECTOR),
        TensorMapping(
            "transformer.h.{layer}.attn.c_attn.weight",
            _kernels("attention/query", "attention/key", "attention/value"),
            HEADS_IN,
        ),
        TensorMapping(
            "transformer.h.{layer}.attn.c_attn.bias",
            ("layers/attention/query/bias", "layers/attention/key/bias", "layers/attention/value/bias"),
            HEADS_BIAS,
        ),
        TensorMapping("transformer.h.{layer}.attn.c_proj.weight", _kernels("attention/output"), HEADS_OUT),
        TensorMapping("transformer.h.{layer}.ln_2.weight", ("layers/mlp_norm/scale",), VECTOR),
        TensorMapping("transformer.h.{layer}.mlp.w1.weight", _kernels("mlp/up"), FFN_IN),
        TensorMapping("transformer.h.{layer}.mlp.w2.weight", _kernels("mlp/gate"), FFN_IN),
        TensorMapping("transformer.h.{layer}.mlp.c_proj.weight", _kernels("mlp/down"), FFN_OUT),
        TensorMapping("transformer.ln_f.weight", ("final_norm/scale",), VECTOR),
        TensorMapping("lm_head.weight", ("output",), UNEMBED),
        *VISUAL,
    ),
    fields=(
        ConfigField("vocab_size", "vocab_size", earlier=("padded_vocab_size",)),
        ConfigField("hidden_size", "hidden_size", earlier=("n_embd",)),
        ConfigField("num_layers", "num_hidden_layers", earlier=("n_layer",)),
        ConfigField("num_heads", "num_attention_heads", earlier=("n_head",)),
        ConfigField("ffn_size", "intermediate_size", earlier=("ffn_hidden_size",), factor=2),
        ConfigField("head_dim", "kv_channels", 128),
        ConfigField("context_length", "seq_length"),
        ConfigField("rope_theta", "rotary_emb_base", 10000),
        ConfigField("norm_epsilon", "layer_norm_epsilon", 1e-6),
        ConfigField("use_dynamic_ntk", "use_dynamic_ntk", True),
        ConfigField("use_logn", "use_logn_attn", True),
        ConfigField("init_std", "initializer_range", 0.02),
        ConfigField("embedding_dropout", "emb_dropout_prob", 0.0, earlier=("embd_pdrop",)),
        ConfigField("attention_dropout", "attn_dropout_prob", 0.0, earlier=("attn_pdrop",)),
    ),
    fixed={
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "pos_emb": "rotary",
        "apply_residual_connection_post_layernorm": False,
    },
    constants={
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_flash_attn": "auto",
        "onnx_safe": None,
    },
    refuse=_refuse_qwen,
    redundant=r"transformer\.(rotary_emb\.inv_freq|logn_tensor|h\.\d+\.attn\.(masked_bias|rotary_emb\.inv_freq))",
)

# Tensors of Qwen2ForCausalLM in transformers, which servers load without further code.
QWEN2 = Format(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    tensors=(
        TensorMapping("model.embed_tokens.weight", ("token_embedding",), EMBED),
        TensorMapping("model.layers.{layer}.input_layernorm.weight", ("layers/attention_norm/scale",), VECTOR),
        TensorMapping("model.layers.{layer}.self_attn.q_proj.weight", _kernels("attention/query"), HEADS_IN),
        TensorMapping("model.layers.{layer}.self_attn.q_proj.bias", ("layers/attention/query/bias",), HEADS_BIAS),
        TensorMapping("model.layers.{layer}.self_attn.k_proj.weight", _kernels("attention/key"), HEADS_IN),
        TensorMapping("model.layers.{layer}.self_attn.k_proj.bias", ("layers/attention/key/bias",), HEADS_BIAS),
        TensorMapping("model.layers.{layer}.self_attn.v_proj.weight", _kernels("attention/value"), HEADS_IN),
        TensorMapping("model.layers.{layer}.self_attn.v_proj.bias", ("layers/attention/value/bias",), HEADS_BIAS),
        TensorMapping("model.layers.{layer}.self_attn.o_proj.weight", _kernels("attention/output"), HEADS_OUT),
        TensorMapping("model.layers.{layer}.post_attention_layernorm.weight", ("layers/mlp_norm/scale",), VECTOR),
        TensorMapping("model.layers.{layer}.mlp.gate_proj.weight", _kernels("mlp/gate"), FFN_IN),
        TensorMapping("model.layers.{layer}.mlp.up_proj.weight", _kernels("mlp/up"), FFN_IN),
        TensorMapping("model.layers.{layer}.mlp.down_proj.weight", _kernels("mlp/down"), FFN_OUT),
        TensorMapping("model.norm.weight", ("final_norm/scale",), VECTOR),
        TensorMapping("lm_head.weight", ("output",), UNEMBED),
    ),
    fields=(
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("hidden_size", "hidden_size"),
        ConfigField("num_layers", "num_hidden_layers"),
        ConfigField("num_heads", "num_attention_heads"),
        ConfigField("num_kv_heads", "num_key_value_heads", None),
        ConfigField("head_dim", "head_dim", None),
        ConfigField("ffn_size", "intermediate_size"),
        ConfigField("context_length", "max_position_embeddings"),
        ConfigField("norm_epsilon", "rms_norm_eps", 1e-6),
        ConfigField("tie_embeddings", "tie_word_embeddings", False),
        ConfigField("init_std", "initializer_range", 0.02),
        ConfigField("attention_dropout", "attention_dropout", 0.0),
    ),
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    constants={"hidden_act": "silu", "use_sliding_window": False, "use_cache": True},
    refuse=_refuse_qwen2,
    redundant=r"model\.(rotary_emb|layers\.\d+\.self_attn\.rotary_emb)\.inv_freq",
    tied_output="lm_head.weight",
    rope_parameters=True,
)

# Reward models: Qwen2ForSequenceClassification of transformers with one label. It reads its score at the last token
# that is not the pad token.
QWEN2_REWARD = dataclasses.replace(
    QWEN2,
    name="qwen2_reward",
    architecture="Qwen2ForSequenceClassification",
    tensors=(*QWEN2.tensors[:-1], TensorMapping("score.weight", ("score",), SCORE)),
    constants={
        **QWEN2.constants,
        # `num_labels` of transformers is the number of these names.
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        # How transformers computes a loss from labels; scores do not depend on it.
        "problem_type": "regression",
    },
    tied_output=None,
    head="scalar",
)

FORMATS: dict[str, Format] = {table.name: table for table in (QWEN, QWEN2, QWEN2_REWARD)}


class Weights(Protocol):
    """A source of parameters, read one at a time, so that conversion needs no second copy of a model.

    config: configuration of the model.
    dtype: "bfloat16" if it holds all parameters exactly, else "float32".
    position_limit: number of positions that context extension reaches, as the source says, or None.
    """

    config: ModelConfig
    dtype: str
    position_limit: int | None

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """Our parameter `path` in its stored dtype, or in `dtype`, to which the caller rounds what it reads.

        `layer` selects a block of a stacked parameter, and the result lacks the layer axis; None for all others.
        Callers read the blocks of one parameter in ascending order.
        """


@dataclasses.dataclass(frozen=True)
class ExternalTensor:
    """An expected tensor: external name and shape, mapping, and index of its block; None: it belongs to no block."""

    name: str
    shape: tuple[int, ...]
    mapping: TensorMapping
    layer: int | None


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Path, such as `layers/mlp/up/kernel`, to shape of every parameter; the stacked ones with their layer axis."""
    shapes = flatten_dict(nn.meta.unbox(abstract_params(build_model(config))), sep="/")
    return types.MappingProxyType({path: tuple(leaf.shape) for path, leaf in shapes.items()})


def is_stacked(path: str) -> bool:
    """Whether a parameter has the leading layer axis."""
    return path.startswith((LAYER_PREFIX, VISION_LAYER_PREFIX))


def _axes(layout: str) -> tuple[list[str], list[list[str]]]:
    ours, theirs = layout.split("->")
    groups = [(group or single).split() for group, single in re.findall(r"\(([^)]*)\)|(\w+)", theirs)]
    return ours.split(), groups


def external_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the external tensor for a parameter (without layer axis) of this shape."""
    ours, groups = _axes(layout)
    sizes = dict(zip(ours, shape, strict=True))
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


def to_external(layout: str, array: np.ndarray) -> np.ndarray:
    """Our parameter (without layer axis) in the external layout: same numbers, same dtype."""
    ours, groups = _axes(layout)
    moved = array.transpose([ours.index(axis) for group in groups for axis in group])
    return moved.reshape(external_shape(layout, array.shape))


def from_external(layout: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_external`, for a parameter (without layer axis) of this shape."""
    ours, groups = _axes(layout)
    sizes = dict(zip(ours, shape, strict=True))
    theirs = [axis for group in groups for axis in group]
    return array.reshape([sizes[axis] for axis in theirs]).transpose([theirs.index(axis) for axis in ours])


def external_tensors(table: Format, config: ModelConfig) -> list[ExternalTensor]:
    """All tensors of a model in an external format, in the order of the table, then of the layers.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    reasons = table.refuse(config)
    if config.head != table.head:
        reasons = [f"a model with the head {config.head!r} (its own are {table.head!r})", *reasons]
    if reasons:
        raise ValueError(
            f"format {table.name} ({table.architecture}) cannot express {'; '.join(reasons)}: choose another target"
        )
    shapes = dict(parameter_shapes(config))
    tensors = []
    for mapping in table.tensors:
        if not set(mapping.parts) & set(shapes):
            continue  # a parameter that this configuration lacks: the output projection of tied embeddings
        stacked, layers = is_stacked(mapping.parts[0]), shapes[mapping.parts[0]][0]
        parts = [external_shape(mapping.layout, shapes.pop(part)[1 if stacked else 0 :]) for part in mapping.parts]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        for layer in range(layers) if stacked else (None,):
            tensors.append(ExternalTensor(mapping.external.format(layer=layer), shape, mapping, layer))
    if shapes:
        raise ValueError(f"format {table.name} has no tensor for the parameters {', '.join(sorted(shapes))}")
    return tensors


def copy_moved(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source` for arrays of one shape, where `source` may have its axes moved.

    Goes by blocks that fit into the processor's cache, each read in the order of memory and then transposed: bfloat16
    takes a seventh of the time that it takes numpy. It is copied as integers, the upper half of the bits of float32.

    Args:
      target: contiguous in its last axis.
    """
    copy: Callable[[np.ndarray, np.ndarray], None] = np.copyto
    if (source.dtype, target.dtype) == (_BFLOAT16, np.float32):
        source, target, copy = source.view(np.uint16), target.view(np.uint32), _widen
    elif (source.dtype, target.dtype) == (np.float32, _BFLOAT16):
        target, copy = target.view(np.uint16), _round
    elif source.dtype == target.dtype == _BFLOAT16:
        source, target = source.view(np.uint16), target.view(np.uint16)
    elif source.dtype != target.dtype:
        copy = _cast
    if source.ndim < 2 or source.flags.c_contiguous:
        copy(target, source)
        return
    rows = source.reshape(len(source), -1)
    into = target.reshape(rows.shape)
    # Rows of a power of two would take each other's places in the cache.
    gathered = np.empty((COPY_BLOCK, COPY_BLOCK + 32), source.dtype)
    for i in range(0, rows.shape[0], COPY_BLOCK):
        for j in range(0, rows.shape[1], COPY_BLOCK):
            place = slice(i, i + COPY_BLOCK), slice(j, j + COPY_BLOCK)
            block = rows[place]
            if block.strides[0] < block.strides[1]:
                block = gathered[: block.shape[1], : block.shape[0]].T
                np.copyto(block, rows[place])
            copy(into[place], block)


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _widen(target: np.ndarray, source: np.ndarray) -> None:
    """float32 of bfloat16, both as unsigned integers."""
    np.left_shift(source, 16, out=target, dtype=np.uint32)


def _round(target: np.ndarray, source: np.ndarray) -> None:
    """bfloat16, as unsigned integers, of float32."""
    target[...] = source.astype(_BFLOAT16).view(np.uint16)


def _cast(target: np.ndarray, source: np.ndarray) -> None:
    target[...] = source


def float32_copy(source: np.ndarray) -> np.ndarray:
    """A contiguous copy of the array in float32."""
    copy = np.empty(source.shape, np.float32)
    copy_moved(source, copy)
    return copy


def gather(weights: Weights, tensor: ExternalTensor, dtype: Any = None) -> np.ndarray:
    """An external tensor made of our parameters, in `dtype`; None: their stored dtype."""
    return assemble(tensor, read_parts(weights, tensor, dtype), dtype)


def read_parts(weights: Weights, tensor: ExternalTensor, dtype: Any = None) -> list[np.ndarray]:
    """The parameters that an external tensor is made of; `dtype` as for `Weights.read`."""
    return [weights.read(part, tensor.layer, dtype) for part in tensor.mapping.parts]


def assemble(tensor: ExternalTensor, parts: Sequence[np.ndarray], dtype: Any = None) -> np.ndarray:
    """An external tensor, contiguous, made of its `read_parts`; `dtype` as for `gather`."""
    parts = [to_external(tensor.mapping.layout, part) for part in parts]
    if len(parts) == 1 and parts[0].flags.c_contiguous and parts[0].dtype == (dtype or parts[0].dtype):
        return parts[0]
    whole = np.empty(tensor.shape, dtype or parts[0].dtype)
    start = 0
    for part in parts:
        copy_moved(part, whole[start : start + len(part)])
        start += len(part)
    return whole


def read_parameter(weights: Weights, path: str) -> np.ndarray:
    """A whole parameter in float32, layers stacked; holds one block besides the result."""
    shape = parameter_shapes(weights.config)[path]
    whole = np.empty(shape, np.float32)
    if not is_stacked(path):
        copy_moved(weights.read(path, None), whole)
        return whole
    for layer in range(shape[0]):
        copy_moved(weights.read(path, layer), whole[layer])
    return whole
