"""Attention kernels against the reference, packed or not, gradients included; which of them runs where."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models import kernels
from qwen_jax.models.blockwise import blockwise_attention
from qwen_jax.models.config import AttentionBlocks, ModelConfig
from qwen_jax.models.splash import splash as splash_attention
from qwen_jax.sharding import MeshConfig, make_mesh, use_mesh

LENGTH = 256
SMALL_BLOCKS = AttentionBlocks(
    **dict.fromkeys(("query", "key", "key_step", "backward_query", "backward_key", "backward_key_step"), 128)
)


def inputs(batch, heads, kv_heads, packed, head_dim=16):
    random = np.random.default_rng(0)
    query, cotangent = (random.standard_normal((batch, heads, LENGTH, head_dim), np.float32) for _ in range(2))
    key, value = (random.standard_normal((batch, kv_heads, LENGTH, head_dim), np.float32) for _ in range(2))
    boundaries = random.random((batch, LENGTH)) < 0.02
    return (query, key, value), cotangent, np.cumsum(boundaries, 1, dtype=np.int32) if packed else None


def output_and_gradients(attention, arrays, cotangent):
    output, pull = jax.vjp(jax.jit(attention), *arrays)
    return output, *pull(cotangent)


def reference(segment_ids):
    def attention(query, key, value):
        return kernels.dot_product_attention(query, key, value, kernels.causal_mask(LENGTH, segment_ids))

    return attention


@pytest.mark.parametrize(
    "blocks", [SMALL_BLOCKS, AttentionBlocks(backward_query=128, key_step=128)], ids=["small", "mixed"]
)
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
def test_the_tpu_kernel_equals_the_reference(kv_heads, packed, blocks):
    arrays, cotangent, segment_ids = inputs(2, 4, kv_heads, packed)

    def splash(query, key, value):
        return splash_attention(query, key, value, segment_ids, blocks=blocks, interpret=True)

    expected = output_and_gradients(reference(segment_ids), arrays, cotangent)
    for name, found, exact in zip(
        ("output", "query", "key", "value"), output_and_gradients(splash, arrays, cotangent), expected, strict=True
    ):
        assert float(jnp.abs(exact).max()) > 0.5, name
        np.testing.assert_allclose(found, exact, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_the_tpu_kernel_runs_on_each_device_of_a_mesh(packed):
    arrays, cotangent, segment_ids = inputs(4, 4, 2, packed)
    with use_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found = output_and_gradients(
            lambda *qkv: splash_attention(*qkv, segment_ids, blocks=SMALL_BLOCKS, interpret=True), arrays, cotangent
        )
    for one, other in zip(found, output_and_gradients(reference(segment_ids), arrays, cotangent), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def mesh_of(platform, **shape):
    """All that choosing a kernel asks of a mesh."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]), shape=shape)


def config(**changes):
    return ModelConfig(vocab_size=64, hidden_size=256, num_layers=1, num_heads=2, ffn_size=64, **changes)


@pytest.mark.parametrize(
    ("platform", "changes", "length", "kernel"),
    [
        ("tpu", {}, 2048, "splash"),
        ("cpu", {}, 2048, "xla"),
        ("tpu", {"attention_kernel": "xla"}, 2048, "xla"),
        ("tpu", {}, 100, "xla"),
        ("tpu", {"head_dim": 64}, 2048, "xla"),
        ("tpu", {"attention_dropout": 0.1}, 2048, "xla"),
        ("tpu", {"embedding_dropout": 0.1}, 2048, "splash"),
        ("gpu", {"embedding_dropout": 0.1}, 2048, "cudnn"),
        ("gpu", {}, 100, "cudnn"),
        ("gpu", {"dtype": "float32"}, 2048, "xla"),
    ],
)
def test_auto_is_the_platforms_kernel_where_it_can_run(platform, changes, length, kernel):
    assert kernels.resolve_kernel(config(**changes), length, mesh_of(platform)) == kernel


@pytest.mark.parametrize(
    ("platform", "changes", "length", "message"),
    [
        ("cpu", {}, 2048, "the devices are cpus"),
        ("tpu", {}, 100, "multiple of 128 tokens, and these have 100"),
        ("tpu", {"head_dim": 64}, 2048, "ModelConfig.head_dim is 64"),
        ("tpu", {"attention_dropout": 0.1}, 2048, "attention_dropout is 0.1"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(platform, changes, length, message):
    with pytest.raises(ValueError, match=message):
        kernels.resolve_kernel(config(attention_kernel="splash", **changes), length, mesh_of(platform))


def test_block_sizes_come_back_from_json():
    here = config(attention_blocks=AttentionBlocks(query=1024))
    assert ModelConfig(**here.to_dict()) == here
    with pytest.raises(ValueError, match="AttentionBlocks.key must be a positive multiple of 128, found 100"):
        AttentionBlocks(key=100)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
def test_attention_in_blocks_equals_the_reference(kv_heads, packed):
    arrays, cotangent, segment_ids = inputs(2, 4, kv_heads, packed)

    def blockwise(query, key, value):
        return blockwise_attention(query, key, value, segment_ids)

    expected = output_and_gradients(reference(segment_ids), arrays, cotangent)
    for name, found, exact in zip(
        ("output", "query", "key", "value"), output_and_gradients(blockwise, arrays, cotangent), expected, strict=True
    ):
        np.testing.assert_allclose(found, exact, atol=2e-5, err_msg=name)


def test_attention_in_blocks_keeps_no_square_of_the_length():
    arrays, cotangent, _ = inputs(2, 4, 4, False)

    def temporaries(attention):
        def gradients(arrays, cotangent):
            return jax.vjp(attention, *arrays)[1](cotangent)

        return jax.jit(gradients).lower(arrays, cotangent).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(blockwise_attention) < 0.8 * temporaries(reference(None))
