"""GGUF, the file format of llama.cpp and software on top of it: architecture "qwen2", tokenizer included.

Needs the package `gguf`, which llama.cpp publishes; nothing else of the project does.
"""

import contextlib
import dataclasses
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.conversion.checksums import Checksums
from qwen_jax.conversion.external import ExternalWeights, StoredTensor
from qwen_jax.conversion.mapping import QWEN2, Weights, external_tensors
from qwen_jax.conversion.pipelines import assembled
from qwen_jax.conversion.tokenizer import CHAT_TEMPLATE, RANKS_FILE, ranks_of, tokenizer_json
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.models.config import ModelConfig

NAME = "gguf"
MAGIC = b"GGUF"
ARCHITECTURE = "qwen2"
PRE_TOKENIZER = "qwen2"  # llama.cpp's name for splitting text by Qwen's pattern
_LAYER = "blk.{layer}."
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _name(external: str) -> str:
    if external in _NAMES:
        return _NAMES[external]
    part, _, kind = external.removeprefix("model.layers.{layer}.").rpartition(".")
    return f"{_LAYER}{_NAMES[part]}.{kind}"


# The tensors of format qwen2 under llama.cpp's names; rotary positions are the same half-split rotation.
GGUF = dataclasses.replace(
    QWEN2,
    name=NAME,
    architecture=ARCHITECTURE,
    tensors=tuple(dataclasses.replace(one, external=_name(one.external)) for one in QWEN2.tensors),
)


def _library():
    try:
        import gguf
    except ImportError as error:
        raise ValueError("format gguf needs the Python package of that name: pip install gguf") from error
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with files.open_file(path) as stream:
        return stream.read(len(MAGIC)) == MAGIC


def write_gguf(
    file: Path, weights: Weights, tokenizer: Tokenizer | None, dtype: str, checksums: Checksums, progress: bool
) -> None:
    """Writes a GGUF file, one tensor after the other.

    Args:
      dtype: dtype of the matrices, "float32" or "bfloat16". Vectors (norms and biases) are float32 for llama.cpp.
      checksums: records every tensor.
      progress: whether to show a progress bar.

    Raises:
      ValueError: there is no tokenizer, or one of single bytes, without which llama.cpp loads no model; the package
        `gguf` is missing; or the format cannot express the model.
    """
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer: name the .tiktoken file of the model")
    if tokenizer.num_ranks <= 256:
        raise ValueError(f"{tokenizer.origin} has single bytes only: llama.cpp loads no vocabulary without merges")
    gguf, config = _library(), weights.config
    tensors = external_tensors(GGUF, config)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    _add_config(writer, config, gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, gguf.TokenType, tokenizer, config.vocab_size)
    kinds = [ml_dtypes.bfloat16 if dtype == "bfloat16" and len(tensor.shape) > 1 else np.float32 for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        wide = kind is np.float32
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32 if wide else np.uint16),
            math.prod(tensor.shape) * (4 if wide else 2),
            gguf.GGMLQuantizationType["F32" if wide else "BF16"],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with contextlib.closing(assembled(weights, zip(tensors, kinds, strict=True))) as arrays:
        for tensor, kind in zip(tqdm(tensors, desc="tensors", disable=not progress), kinds, strict=True):
            array = next(arrays)
            checksums.add(tensor.name, array)
            writer.write_tensor_data(array if kind is np.float32 else array.view(np.uint16))
            del array
    writer.close()


def _add_config(writer, config: ModelConfig, file_type) -> None:
    writer.add_file_type(file_type)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add_tokenizer(writer, kinds, tokenizer: Tokenizer, rows: int) -> None:
    content = tokenizer_json(tokenizer, rows)
    control = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    content = content["model"]
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [kinds.UNUSED] * rows
    for named, kind in ((content["vocab"], kinds.NORMAL), (control, kinds.CONTROL)):
        for text, i in named.items():
            tokens[i], types[i] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(content["merges"])
    writer.add_bos_token_id(tokenizer.endoftext_id)
    writer.add_eos_token_id(tokenizer.endoftext_id)
    writer.add_eot_token_id(tokenizer.im_end_id)
    writer.add_pad_token_id(tokenizer.endoftext_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


class GgufFile(ExternalWeights):
    """The weights of a GGUF file.

    Raises:
      ValueError: it is of another architecture, has scaled rotary positions, is damaged, or as `ExternalWeights`.
    """

    def __init__(self, file: str | os.PathLike):
        # Software for such files reads them by name. The copy of one in a bucket stays as long as this object.
        held = contextlib.ExitStack()
        local = held.enter_context(files.local_copy(file))
        weakref.finalize(self, held.close)
        reader = _open(local)
        stored = {
            tensor.name: StoredTensor(
                local,
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                int(tensor.data_offset),
            )
            for tensor in reader.tensors
        }
        super().__init__(file, GGUF, _read_config(local, reader, stored), stored)


def _open(file: Path):
    library = _library()
    try:
        reader = library.GGUFReader(file)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # raised on damaged files
        raise ValueError(f"{file} is damaged or was not downloaded whole ({error}): download it again") from error
    _refuse_part(file, reader)
    return reader


def _refuse_part(file: Path, reader) -> None:
    """Refuses one of several parts of a model."""
    count = _field(file, reader, "split.count", 1)
    if count > 1:
        number = _field(file, reader, "split.no", 0) + 1
        raise ValueError(
            f"{file} is part {number} of {count} of a model: join the parts first, with `llama-gguf-split --merge "
            "FIRST-PART JOINED.gguf` of llama.cpp"
        )


def _field(file: Path, reader, key: str, default=None):
    """The content of a field; with None as default, a missing field raises."""
    if (field := reader.get_field(key)) is not None:
        return field.contents()
    if default is None:
        raise ValueError(f"{file} has no field {key}: is it a whole language model?")
    return default


def _read_config(file: Path, reader, stored: dict[str, StoredTensor]) -> ModelConfig:
    if (found := _field(file, reader, "general.architecture")) != ARCHITECTURE:
        raise ValueError(f"{file} is a model of architecture {found!r}: expected {ARCHITECTURE!r}")
    if (scaling := _field(file, reader, f"{ARCHITECTURE}.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{file} has rotary positions scaled by {scaling!r}, which this model does not compute")
    if "token_embd.weight" not in stored:
        raise ValueError(f"{file} has no tensor token_embd.weight: is it a whole language model?")

    def value(key, default=None):
        return _field(file, reader, f"{ARCHITECTURE}.{key}", default)

    width, heads = value("embedding_length"), value("attention.head_count")
    return ModelConfig(
        vocab_size=stored["token_embd.weight"].shape[0],
        hidden_size=width,
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", width // heads),
        ffn_size=value("feed_forward_length"),
        context_length=value("context_length"),
        rope_theta=_shortest(value("rope.freq_base", 10000.0)),
        norm_epsilon=_shortest(value("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in stored,
    )


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to this float32: 1e-06, not 9.99999997e-07."""
    return float(str(np.float32(value)))


def recover_gguf_ranks(file: Path, scratch: Path) -> Path | None:
    """The `.tiktoken` file of a GGUF file's tokenizer, written into the existing folder `scratch`; None: it has none.

    Raises:
      ValueError: the tokenizer is not Qwen's, so ids would differ.
    """
    reader = _open(file)
    if reader.get_field("tokenizer.ggml.tokens") is None:
        return None
    normal, control = _library().TokenType.NORMAL, _library().TokenType.CONTROL
    tokens = _field(file, reader, "tokenizer.ggml.tokens")
    types = _field(file, reader, "tokenizer.ggml.token_type")
    known = _field(file, reader, "tokenizer.ggml.pre", "") == PRE_TOKENIZER
    content = {
        "model": {
            "type": "BPE" if _field(file, reader, "tokenizer.ggml.model") == "gpt2" else None,
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == normal},
            "merges": _field(file, reader, "tokenizer.ggml.merges"),
        },
        "added_tokens": [
            {"content": token, "id": i}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == control
        ],
        "normalizer": "NFC",
        "pre_tokenizer": Tokenizer.PATTERN if known else "",
    }
    write_ranks(ranks_of(file, content), scratch / RANKS_FILE)
    return scratch / RANKS_FILE


def read_again(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor, as `write_gguf` named them to its checksums."""
    for tensor in _open(file).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield tensor.name, StoredTensor(file, tensor.tensor_type.name, shape, int(tensor.data_offset)).read(0, shape[0])
