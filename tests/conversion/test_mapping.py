"""The tables: exact in both directions, complete, and honest about what they cannot express."""

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

from qwen_jax.conversion import mapping as tables
from qwen_jax.conversion.mapping import (
    FORMATS,
    external_shape,
    external_tensors,
    from_external,
    is_stacked,
    parameter_shapes,
    to_external,
)
from qwen_jax.models.build import parameter_count
from qwen_jax.models.config import ModelConfig


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_are_exact_in_both_directions(name, config):
    shapes = parameter_shapes(dataclasses.replace(config, head=FORMATS[name].head))
    for mapping in FORMATS[name].tensors:
        for part in shapes.keys() & mapping.parts:  # those of the image encoder are tests/models/test_vision.py's
            shape = shapes[part][1:] if is_stacked(part) else shapes[part]
            ours = np.arange(np.prod(shape)).reshape(shape)
            theirs = to_external(mapping.layout, ours)
            assert theirs.shape == external_shape(mapping.layout, shape)
            np.testing.assert_array_equal(from_external(mapping.layout, theirs, shape), ours)


def test_linear_weights_become_out_by_in(config):
    """x @ W.T of the external format is the product that our attention computes."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((5, 48)), rng.standard_normal((48, 3, 16))
    ours = np.einsum("ld,dhk->lhk", x, kernel).reshape(5, 48)
    np.testing.assert_allclose(x @ to_external("d h k -> (h k) d", kernel).T, ours)
    back = rng.standard_normal((3, 16, 48))
    ours = np.einsum("lhk,hkd->ld", ours.reshape(5, 3, 16), back)
    theirs = np.einsum("ld,dhk->lhk", x, kernel).reshape(5, 48) @ to_external("h k d -> d (h k)", back).T
    np.testing.assert_allclose(theirs, ours)


@pytest.mark.parametrize("name", FORMATS)
def test_every_parameter_is_in_the_table(name, config):
    config = dataclasses.replace(config, head=FORMATS[name].head)
    tensors = external_tensors(FORMATS[name], config)
    assert sum(np.prod(tensor.shape) for tensor in tensors) == parameter_count(config)
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_released_7b_has_the_published_number_of_parameters():
    config = ModelConfig(vocab_size=151936, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=11008)
    shapes = {tensor.name: tensor.shape for tensor in external_tensors(FORMATS["qwen"], config)}
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == 7_721_324_544
    assert shapes["transformer.h.31.attn.c_attn.weight"] == (12288, 4096)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (4096, 11008)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_kv_heads": 1}, "grouped-query attention"),
        ({"tie_embeddings": True}, "tied embeddings"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"head_dim": 8}, r"num_heads \* head_dim"),
    ],
)
def test_qwen_refuses_by_name_what_it_cannot_express(config, change, words):
    with pytest.raises(ValueError, match=words):
        external_tensors(FORMATS["qwen"], dataclasses.replace(config, **change))


def test_qwen2_has_grouped_queries_and_tied_embeddings(config):
    grouped = dataclasses.replace(config, num_kv_heads=1, tie_embeddings=True)
    shapes = {tensor.name: tensor.shape for tensor in external_tensors(FORMATS["qwen2"], grouped)}
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 48)
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize("source, target", itertools.product(("float32", ml_dtypes.bfloat16), repeat=2))
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_moved_copies_have_the_bits_that_numpy_gives(source, target, axes, monkeypatch):
    monkeypatch.setattr(tables, "COPY_BLOCK", 8)
    bits = np.random.default_rng(0).integers(0, 2**16, (12, 9, 10), np.uint16)  # infinities and subnormals too
    values = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    values = np.where(np.isnan(values), np.float32(1 / 3), values).astype(source).transpose(axes)
    found = np.empty(values.shape, target)
    tables.copy_moved(values, found)
    expected = np.ascontiguousarray(values.astype(target))
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
