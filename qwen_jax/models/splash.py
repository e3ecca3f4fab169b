"""Causal attention on TPUs by JAX's splash attention, a kernel in Pallas.

A file of its own, imported where the kernel runs, because importing Pallas for TPUs takes a tenth of a second.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.models.config import AttentionBlocks
from qwen_jax.models.kernels import TPU_LANES
from qwen_jax.models.sequence_parallel import AXIS, balance, balanced_positions, gather_rows, unbalance
from qwen_jax.sharding import mesh_in_use, num_shards, spec


def _splash_blocks(blocks: AttentionBlocks, queries: int, keys: int) -> splash_attention.BlockSizes:
    """Block sizes for the kernel: the largest up to the configured ones that divide queries and keys."""

    def fit(size, whole):
        return max(part for part in range(TPU_LANES, min(size, whole) + 1, TPU_LANES) if whole % part == 0)

    key, backward_key = fit(blocks.key, keys), fit(blocks.backward_key, keys)
    return splash_attention.BlockSizes(
        block_q=fit(blocks.query, queries),
        block_kv=key,
        block_kv_compute=fit(blocks.key_step, key),
        block_q_dkv=fit(blocks.backward_query, queries),
        block_kv_dkv=backward_key,
        block_kv_dkv_compute=fit(blocks.backward_key_step, backward_key),
        use_fused_bwd_kernel=True,
    )


def splash(query, key, value, segment_ids=None, *, blocks: AttentionBlocks, interpret: bool = False) -> jax.Array:
    """Causal attention by JAX's Pallas kernel for TPUs, which skips blocks above the diagonal (no [length, length]).

    One call per device: rows over the batch's mesh axes, heads over theirs, and the queries of a row over `sequence`,
    whose devices gather each other's keys and values. The backward pass is one kernel, too.

    Args:
      query, key, value: as in `dot_product_attention`, keys and queries being the same positions.
      segment_ids: int32 [batch, length], or None.
      interpret: run the kernel by XLA operations, on any platform: for tests.
    """
    heads, length, head_dim = query.shape[1:]
    shards = num_shards("length")
    mask = splash_attention.CausalMask((length, length))
    if shards > 1:
        mask.q_sequence = balanced_positions(length, shards)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * (heads // num_shards("heads"))),
        # No block of queries reaches over from one of a device's two chunks to the other.
        block_sizes=_splash_blocks(blocks, length if shards == 1 else length // shards // 2, length),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def on_device(kernel, query, key, value, segment_ids):
        ids = None if segment_ids is None else splash_attention.SegmentIds(segment_ids, segment_ids)
        if shards > 1:
            query, key, value = balance(query, 2, shards), gather_rows(key, 2), gather_rows(value, 2)
            if ids is not None:
                ids = splash_attention.SegmentIds(balance(segment_ids, 1, shards), gather_rows(segment_ids, 1))
        mixed = jax.vmap(kernel)(query, key, value, ids)
        return mixed if shards == 1 else unbalance(mixed, 2, shards)

    query = checkpoint_name((query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype), "query")
    key, value = checkpoint_name(key, "key"), checkpoint_name(value, "value")
    mesh = mesh_in_use()
    if mesh is None or mesh.size == 1:
        return on_device(kernel, query, key, value, segment_ids)
    placed, kv_placed = (spec(("batch", name, "length", None)) for name in ("heads", "kv_heads"))
    mask_placed = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, AXIS)))
    # The kernel says nothing about which mesh axes its results vary over.
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(mask_placed, placed, kv_placed, kv_placed, spec(("batch", "length"))),
        out_specs=placed,
        check_vma=False,
    )(kernel, query, key, value, segment_ids)
