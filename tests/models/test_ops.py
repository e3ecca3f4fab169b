"""Primitives with hand-placed gradients: what the layout of TPUs must not change."""

import jax
import numpy as np
import pytest

from qwen_jax.models import ops
from qwen_jax.sharding import MeshConfig, make_mesh, sum_over_replicas, use_mesh


@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "sequence": 4}])
def test_the_gradient_of_the_embedding_is_the_same_by_rows(layout, monkeypatch):
    """As TPUs with SparseCores sum it; rows that fill up tiles do not appear. Integers: no order of sums matters."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, (16, 8), np.int32)
    weights = rng.integers(-3, 4, (16, 8, 32)).astype(np.float32)
    table = np.zeros((100, 32), np.float32)
    batch, axes = {"tokens": tokens, "weights": weights}, {"tokens": ("length",), "weights": ("length", None)}

    def gradient(table, batch, _):
        return jax.grad(lambda table: (ops.embed(table, batch["tokens"]) * batch["weights"]).sum())(table)

    def compiled():
        with use_mesh(make_mesh(MeshConfig(**{"fsdp": 1, **layout}))):
            return jax.jit(lambda t, b: sum_over_replicas(gradient, axes)(t, b, None)).lower(table, batch).compile()

    plain = compiled()
    monkeypatch.setattr(ops, "has_sparse_cores", lambda: True)
    by_rows = compiled()
    assert "128,32]" in by_rows.as_text() and "128,32]" not in plain.as_text()
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    for program in (plain, by_rows):
        np.testing.assert_array_equal(program(table, batch), expected)
