"""Rows split over devices: the same work for each, the same attention and gradients as in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models import kernels
from qwen_jax.models.config import AttentionBlocks
from qwen_jax.models.sequence_parallel import balance, balanced_positions, unbalance
from qwen_jax.models.splash import splash as splash_attention
from qwen_jax.sharding import MeshConfig, make_mesh, spec, sum_over_replicas, use_mesh

BLOCKS = AttentionBlocks(
    **dict.fromkeys(("query", "key", "key_step", "backward_query", "backward_key", "backward_key_step"), 128)
)


@pytest.mark.parametrize("shards", [2, 3, 4, 8, 16])
def test_every_device_has_the_same_number_of_keys_to_see(shards):
    length = 6 * shards
    positions = balanced_positions(length, shards)
    np.testing.assert_array_equal(np.sort(positions), np.arange(length))
    work = (positions + 1).reshape(shards, -1).sum(axis=1)
    assert work.min() == work.max()


def test_queries_go_where_their_positions_say_and_come_back():
    x = jnp.arange(48, dtype=jnp.int32).reshape(2, 24)
    with use_mesh(make_mesh(MeshConfig(fsdp=1, sequence=4), jax.devices()[:4])) as mesh:
        rows = spec(("batch", "length"))

        def there_and_back(x):
            there = balance(x, 1, 4)
            return there, unbalance(there, 1, 4)

        there, back = jax.shard_map(there_and_back, mesh=mesh, in_specs=rows, out_specs=(rows, rows))(x)
    np.testing.assert_array_equal(there, np.asarray(x)[:, balanced_positions(24, 4)])
    np.testing.assert_array_equal(back, x)


def inputs(length, packed):
    random = np.random.default_rng(0)
    query, cotangent = (random.standard_normal((2, 4, length, 16), np.float32) for _ in range(2))
    key, value = (random.standard_normal((2, 2, length, 16), np.float32) for _ in range(2))
    boundaries = random.random((2, length)) < 0.01
    ids = np.cumsum(boundaries, 1, dtype=np.int32) if packed else np.zeros((2, length), np.int32)
    return {"query": query, "key": key, "value": value}, {"cotangent": cotangent, "segment_ids": ids}


def gradients(attention, arrays, rows):
    """{"query", ...: gradient, "output": attention's output}, of the sum of outputs times `cotangent`."""

    def loss(arrays):
        output = attention(arrays["query"], arrays["key"], arrays["value"], rows["segment_ids"])
        return jnp.sum(output * rows["cotangent"]), output

    (_, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"output": output, **gradient}


@pytest.mark.parametrize(
    ("layout", "length", "packed"),
    [
        ({"fsdp": 2, "tensor": 2, "sequence": 2}, 512, True),
        pytest.param({"fsdp": 2, "sequence": 4}, 1024, True, marks=pytest.mark.slow),
        pytest.param({"fsdp": 1, "sequence": 8}, 2048, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_tpu_kernel_on_split_rows_equals_the_reference(layout, length, packed):
    arrays, rows = inputs(length, packed)

    def reference(query, key, value, ids):
        return kernels.dot_product_attention(query, key, value, kernels.causal_mask(length, ids))

    def splash(query, key, value, ids):
        return splash_attention(query, key, value, ids if packed else None, blocks=BLOCKS, interpret=True)

    with use_mesh(make_mesh(MeshConfig(**layout), jax.devices()[: int(np.prod(list(layout.values())))])):
        found = gradients(splash, arrays, rows)
    for name, exact in gradients(reference, arrays, rows).items():
        assert float(jnp.abs(exact).max()) > 0.5, name
        np.testing.assert_allclose(found[name], exact, atol=2e-5, err_msg=name)


def test_the_tpu_kernel_on_the_rows_of_each_copy_equals_the_reference():
    """Copies of the parameters, here a scale, each with rows split over two devices."""
    arrays, rows = inputs(512, True)
    batch, scale = {**arrays, **rows}, jnp.asarray([0.7, 1.3])

    def gradient(attention):
        def loss(scale, batch, _):
            query = batch["query"] * jnp.repeat(scale, 2)[:, None, None]
            return jnp.sum(attention(query, batch["key"], batch["value"], batch["segment_ids"]) * batch["cotangent"])

        axes = dict.fromkeys(batch, ("length",))
        return lambda scale, batch: sum_over_replicas(jax.value_and_grad(loss), axes)(scale, batch, None)

    def reference(query, key, value, ids):
        return kernels.dot_product_attention(query, key, value, kernels.causal_mask(512, ids))

    def splash(query, key, value, ids):
        return splash_attention(query, key, value, ids, blocks=BLOCKS, interpret=True)

    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, sequence=2))):
        found = jax.jit(gradient(splash))(scale, batch)
    expected = jax.jit(gradient(reference))(scale, batch)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
