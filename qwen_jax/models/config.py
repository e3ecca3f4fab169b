"""The sizes and switches of one model."""

import dataclasses
import math

import jax.numpy as jnp

from qwen_jax.models.lora import LoraConfig
from qwen_jax.models.vision.config import RESAMPLER_HEAD_DIM, VisionConfig

# What the backward pass finds in memory of each block; it computes the rest again from the block's input. From the
# fastest to the smallest; `hidden` below is one residual stream in the compute dtype.
REMAT_POLICIES = {
    "none": "everything",
    "dots": "every product with a weight, and not that of attention: about 5 + 3 x ffn_size / hidden_size hidden",
    "weights": "what `minimal` keeps, and the weights of gate and up whole, as they were gathered: 2 x hidden_size x "
    "ffn_size more of each block on each device, which the backward pass does not gather again",
    "minimal": "queries, keys, values, attention, the residual stream after it, gate and up: 5 + 2 x ffn_size / "
    "hidden_size hidden; repeats no product with a weight but the attention's output and FFN's down",
    "qkv": "queries, keys, values and attention: 4 hidden",
    "attention": "attention: 1 hidden; the attention kernel does not run again",
    "full": "nothing",
    "offload": "what `minimal` keeps, in the host's memory",
}
_MINIMAL = ("query", "key", "value", "attention", "residual", "gate", "up")
SAVED_NAMES = {
    "weights": (*_MINIMAL, "gate_weight", "up_weight"),
    "minimal": _MINIMAL,
    "qkv": ("query", "key", "value", "attention"),
    "attention": ("attention",),
}
HEADS = ("tokens", "scalar")
ATTENTION_KERNELS = ("auto", "xla", "splash", "cudnn")
# Table 3 of the report follows dynamic NTK to eight times the training length.
NTK_EXTENSION = 8


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """Sizes of the blocks, in tokens, that TPU attention works in: the largest up to these that divide the sequence.

    They change speed only. A larger block reads memory less often and needs more of the vector memory.

    Attributes:
      query, key: of queries and keys that the forward kernel holds.
      key_step: how many of the keys it multiplies at a time.
      backward_query, backward_key, backward_key_step: the same of the backward kernel, which also writes one partial
        gradient of the queries for every block of keys.
    """

    query: int = 512
    key: int = 512
    key_step: int = 512
    backward_query: int = 512
    backward_key: int = 512
    backward_key_step: int = 512

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 128 or value % 128:
                raise ValueError(f"AttentionBlocks.{field} must be a positive multiple of 128, found {value!r}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of a decoder (report 2.3.1).

    All released Qwen v1 models share the defaults; each size is one file in `gin/models/`.

    Attributes:
      vocab_size: rows of the embedding and of the output projection; at least the tokenizer's size.
      hidden_size: width of the residual stream.
      num_layers: decoder blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; None means `num_heads` (multi-head attention, as in Qwen v1).
      head_dim: width of one head.
      ffn_size: width inside SwiGLU, half of Qwen v1's `intermediate_size`.
      context_length: training context length in tokens (`seq_length` of the released configuration).
      rope_theta: base of the rotary frequencies.
      norm_epsilon: added to the mean square inside RMSNorm.
      qkv_bias: whether the query, key and value projections have a bias.
      tie_embeddings: whether the output projection is the embedding, transposed.
      head: what stands on the final norm: "tokens", the output projection to logits, or "scalar", a projection without
        bias to one number for each position (reward and value models, report 3.2).
      lora: adapters on projections of the blocks; None: none.
      vision: image encoder and resampler, as Qwen-VL has them; None: the model reads text alone.
      use_dynamic_ntk, use_logn: context extension past `context_length` (report 2.3.2), as in the released
        configuration: rotary frequencies that slow down with the prompt's length, and queries that grow with the
        logarithm of their position. Inference only: a training pass is not touched.
      window_sizes: one number per block, lowest first: a query attends to itself and the size - 1 positions before it;
        0 attends to all. None: no window anywhere. Inference only (report 2.3.2: shorter in lower layers). No released
        configuration and no external format has it.
      init_std: standard deviation of the initial weights; projections back into the residual stream get
        init_std / sqrt(2 * num_layers).
      embedding_dropout, attention_dropout: probabilities, used only when `deterministic=False`.
      dtype: compute dtype, "bfloat16" or "float32". Parameters are always float32.
      remat: the activations that each block keeps for the backward pass; one of REMAT_POLICIES.
      attention_kernel: of training passes: "splash" (TPU), "cudnn" (NVIDIA GPU), "xla" (any platform), or "auto", the
        platform's own where it can run. Inference is always XLA's.
      attention_blocks: block sizes of the TPU kernel; hardware files set them.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    num_kv_heads: int | None = None
    head_dim: int = 128
    context_length: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    tie_embeddings: bool = False
    head: str = "tokens"
    lora: LoraConfig | None = None
    vision: VisionConfig | None = None
    use_dynamic_ntk: bool = False
    use_logn: bool = False
    window_sizes: tuple[int, ...] | None = None
    init_std: float = 0.02
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: str = "bfloat16"
    remat: str = "full"
    attention_kernel: str = "auto"
    attention_blocks: AttentionBlocks = AttentionBlocks()

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "head_dim", "context_length"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelConfig.{field} must be a positive integer, found {value!r}")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if not isinstance(kv_heads, int) or kv_heads < 1:
            raise ValueError(f"ModelConfig.num_kv_heads must be a positive integer, found {kv_heads!r}")
        object.__setattr__(self, "num_kv_heads", kv_heads)
        if self.num_heads % kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim must be even for rotary positions, found {self.head_dim}")
        if isinstance(self.attention_blocks, dict):  # from JSON
            object.__setattr__(self, "attention_blocks", AttentionBlocks(**self.attention_blocks))
        if isinstance(self.lora, dict):
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        if isinstance(self.vision, dict):
            object.__setattr__(self, "vision", VisionConfig(**self.vision))
        if self.vision is not None and self.hidden_size % RESAMPLER_HEAD_DIM:
            raise ValueError(
                f"ModelConfig.hidden_size must be a multiple of {RESAMPLER_HEAD_DIM}, the head dimension of the "
                f"resampler, where ModelConfig.vision is set; found {self.hidden_size}"
            )
        self._check_numbers()
        self._check_context_extension()
        for field, allowed in (
            ("head", HEADS),
            ("dtype", ("bfloat16", "float32")),
            ("remat", REMAT_POLICIES),
            ("attention_kernel", ATTENTION_KERNELS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"ModelConfig.{field} must be one of {', '.join(allowed)}; found {value!r}")

    def _check_numbers(self):
        for field in ("rope_theta", "norm_epsilon", "init_std", "embedding_dropout", "attention_dropout"):
            value, share = getattr(self, field), field.endswith("dropout")
            right = isinstance(value, int | float) and (0 <= value < 1 if share else 0 < value < math.inf)
            if not right:
                expected = "in [0, 1)" if share else "a positive number"
                raise ValueError(f"ModelConfig.{field} must be {expected}, found {value!r}")
        for field in ("qkv_bias", "tie_embeddings", "use_dynamic_ntk", "use_logn"):
            if not isinstance(getattr(self, field), bool):  # "false" would be true
                raise ValueError(f"ModelConfig.{field} must be True or False, found {getattr(self, field)!r}")

    def _check_context_extension(self):
        if self.use_logn and self.context_length < 2:
            raise ValueError(
                "ModelConfig.use_logn divides by log(context_length): context_length must be at least 2, found 1"
            )
        if self.window_sizes is None:
            return
        sizes = self.window_sizes if isinstance(self.window_sizes, list | tuple) else (self.window_sizes,)
        # Gin and JSON give lists; a configuration must be hashable.
        object.__setattr__(self, "window_sizes", tuple(sizes))
        if len(sizes) != self.num_layers:
            raise ValueError(
                f"ModelConfig.window_sizes must have one number for each of the {self.num_layers} layers, found "
                f"{len(sizes)}"
            )
        if wrong := [size for size in sizes if type(size) is not int or size < 0]:
            raise ValueError(f"ModelConfig.window_sizes must be positive integers, or 0 for all; found {wrong[0]!r}")

    @property
    def inference_length(self) -> int:
        """Number of tokens that generation may reach: `context_length`, with dynamic NTK eight times that (Table 3)."""
        return self.context_length * (NTK_EXTENSION if self.use_dynamic_ntk else 1)

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass drops anything."""
        adapters = 0.0 if self.lora is None else self.lora.dropout
        return max(self.embedding_dropout, self.attention_dropout, adapters) > 0

    @property
    def compute_dtype(self):
        """The jax dtype of activations."""
        return jnp.dtype(self.dtype)

    @property
    def output_init_std(self) -> float:
        """Initial standard deviation of the projections that write into the residual stream."""
        return self.init_std / (2 * self.num_layers) ** 0.5

    def to_dict(self) -> dict:
        """A JSON-ready dict that `ModelConfig(**d)` turns back into this configuration."""
        return dataclasses.asdict(self)
