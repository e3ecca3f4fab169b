"""The attention kernels behind one interface, and the choice among them."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from qwen_jax.models.blockwise import blockwise_attention
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.ops import matmul_precision
from qwen_jax.sharding import mesh_in_use, num_shards, spec

# Lanes of a TPU's vector unit: splash attention's blocks are multiples of them.
TPU_LANES = 128


def dot_product_attention(
    query, key, value, mask: jax.Array | None, *, dropout_rate=0.0, dropout_rng=None
) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value, with the softmax in float32.

    Args:
      query: [batch, heads, length, head_dim].
      key, value: [batch, kv_heads, keys, head_dim], of the dtype of `query` or of `cache_dtype`; query head h reads kv
        head h // (heads / kv_heads).
      mask: bool, broadcastable to [batch, length, keys]; False is not attended to. None: all are.
      dropout_rate, dropout_rng: dropout on the attention weights when an rng is given.

    Returns:
      [batch, heads, length, head_dim] in the dtype of `query`.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    precision = matmul_precision(query.dtype)
    # b batch, k kv_heads, g query heads of each, l length, m keys, d head_dim.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    logits = jnp.einsum("bkgld,bkmd->bkglm", grouped, key, precision=precision, preferred_element_type=jnp.float32) * (
        head_dim**-0.5
    )
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if dropout_rng is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
    mixed = jnp.einsum("bkglm,bkmd->bkgld", weights.astype(query.dtype), value, precision=precision)
    return mixed.astype(query.dtype).reshape(batch, heads, length, head_dim)


def causal_mask(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Bool [1 or batch, length, length]: query may see key at or before it, within its segment if there are any."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def cudnn(query, key, value, segment_ids=None) -> jax.Array:
    """Causal attention by cuDNN's flash attention for NVIDIA GPUs, forward and backward.

    One call per device, as in `splash`, without splitting rows. Packed rows are masked by a bias, in which a key of
    another segment has weight exactly 0: [batch, 1, length, length] in the compute dtype, for lack of segment ids in
    JAX's interface to cuDNN.

    Args:
      query, key, value: as in `dot_product_attention`, keys and queries being the same positions; bfloat16.
      segment_ids: int32 [batch, length], or None.
    """

    def on_device(query, key, value, segment_ids):
        mask = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (query, key, value)), mask=mask, is_causal=True, implementation="cudnn"
        )
        return mixed.swapaxes(1, 2)

    mesh = mesh_in_use()
    if mesh is None or mesh.size == 1:
        return on_device(query, key, value, segment_ids)
    placed, kv_placed = (spec(("batch", name, None, None)) for name in ("heads", "kv_heads"))
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(placed, kv_placed, kv_placed, spec(("batch", None))),
        out_specs=placed,
        check_vma=False,
    )(query, key, value, segment_ids)


def _splash_refusal(config: ModelConfig, platform: str, length: int | None, mesh_shape: dict[str, int]) -> str | None:
    """The reason for which splash attention cannot run, or None."""
    if platform != "tpu":
        return f"it runs on TPUs, and the devices are {platform}s"
    if config.attention_dropout > 0:
        return f"it has no dropout, and ModelConfig.attention_dropout is {config.attention_dropout}"
    if config.head_dim % TPU_LANES:
        return f"it needs a head_dim that is a multiple of {TPU_LANES}, and ModelConfig.head_dim is {config.head_dim}"
    shards = mesh_shape.get("sequence", 1)
    unit = TPU_LANES if shards == 1 else 2 * shards * TPU_LANES
    if length is None or length % unit:
        split = "" if shards == 1 else f" on sequence={shards} devices"
        return f"it needs sequences of a multiple of {unit} tokens{split}, and these have {length or 0}"
    return None


def _cudnn_refusal(config: ModelConfig, platform: str, packed: bool, mesh_shape: dict[str, int]) -> str | None:
    """The reason for which cuDNN's attention cannot run, or None."""
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, and the devices are {platform}s"
    if config.dtype != "bfloat16":
        return f"it computes in bfloat16, and ModelConfig.dtype is {config.dtype}"
    if config.attention_dropout > 0:
        return f"it is used without dropout, and ModelConfig.attention_dropout is {config.attention_dropout}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, and ModelConfig.head_dim is {config.head_dim}"
    if mesh_shape.get("sequence", 1) > 1:
        return f"it does not split rows, and MeshConfig.sequence is {mesh_shape['sequence']}"
    if packed and mesh_shape.get("data", 1) > 1:
        return f"it has no packed rows with replicas of the parameters, and MeshConfig.data is {mesh_shape['data']}"
    return None


def resolve_kernel(config: ModelConfig, length: int | None, mesh: Mesh | None = None, packed: bool = False) -> str:
    """The kernel of a training pass of `config` over sequences of `length` tokens on the devices of `mesh`.

    "auto" is the platform's own kernel where it can run, and XLA otherwise.

    Args:
      length: None where rows have no tokens.
      mesh: by default the one in use, or JAX's default devices.
      packed: whether rows have segments.

    Raises:
      ValueError: the configured kernel cannot run; the message gives the reason.
    """
    mesh = mesh or mesh_in_use()
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    shape = {} if mesh is None else mesh.shape
    refusals = {
        "xla": None,
        "splash": _splash_refusal(config, platform, length, shape),
        "cudnn": _cudnn_refusal(config, platform, packed, shape),
    }
    if config.attention_kernel == "auto":
        return next((kernel for kernel in ("splash", "cudnn") if refusals[kernel] is None), "xla")
    if refusal := refusals[config.attention_kernel]:
        raise ValueError(
            f'ModelConfig.attention_kernel = {config.attention_kernel!r} cannot run here: {refusal}. "auto" chooses '
            f"one that can"
        )
    return config.attention_kernel


def causal_attention(query, key, value, segment_ids, config: ModelConfig, *, dropout_rng=None) -> jax.Array:
    """Attention of a training pass: of each position to itself and those before it, within its segment.

    Args:
      query: [batch, heads, length, head_dim], not scaled.
      key, value: [batch, kv_heads, length, head_dim].
      segment_ids: int32 [batch, length], or None.
      dropout_rng: for attention dropout; None: no dropout.

    Returns:
      [batch, heads, length, head_dim] in the dtype of `query`.

    Raises:
      ValueError: as `resolve_kernel`.
    """
    length = query.shape[2]
    kernel = resolve_kernel(config, length, packed=segment_ids is not None)
    if kernel == "splash":
        # Imported where it runs: Pallas takes a tenth of a second of every start.
        from qwen_jax.models.splash import splash

        return splash(query, key, value, segment_ids, blocks=config.attention_blocks)
    query, key, value = (checkpoint_name(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value")))
    if kernel == "cudnn":
        return checkpoint_name(cudnn(query, key, value, segment_ids), "attention")
    if dropout_rng is None and num_shards("length") == 1:
        return blockwise_attention(query, key, value, segment_ids)
    mixed = dot_product_attention(
        query,
        key,
        value,
        causal_mask(length, segment_ids),
        dropout_rate=config.attention_dropout,
        dropout_rng=dropout_rng,
    )
    return checkpoint_name(mixed, "attention")
