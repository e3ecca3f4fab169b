"""LoRA in the decoder: fresh adapters change nothing, trained ones compute what the merged kernels do."""

import dataclasses

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import strategies as st

from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.inference import Engine, Request
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.layers import Projection
from qwen_jax.models.lora import PROJECTIONS, LoraConfig, adapter_equations, merge, merged_kernel
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from tests.fakes import random_params, small_model

LORA = LoraConfig(rank=4, alpha=6.0)


def start(config: ModelConfig) -> dict:
    return nn.meta.unbox(jax.jit(Qwen(config).init_params)(jax.random.key(3)))


def trained(config: ModelConfig) -> dict:
    """Parameters of which all, B and the biases too, are other than zero."""
    return random_params(config, 0.05)


def logits(config, params, tokens, **options):
    return jax.jit(lambda params: Qwen(config).apply({"params": params}, tokens, **options))(params)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


def test_fresh_adapters_change_nothing():
    params = start(small_model(lora=LORA))
    flat = flatten_dict(params, sep="/")
    base = {path: flat.pop(path) for path in parameter_shapes(small_model())}
    assert len(flat) == 2 * len(PROJECTIONS)
    for path, leaf in flat.items():
        if path.endswith("lora_b"):
            assert not leaf.any()
        else:  # as torch's kaiming_uniform(a=sqrt(5)): within 1/sqrt(inputs), and about uniform
            bound = np.prod(leaf.shape[1:-1]) ** -0.5
            assert float(jnp.abs(leaf).max()) <= bound and float(jnp.std(leaf)) == pytest.approx(
                bound / 3**0.5, rel=0.1
            )
    np.testing.assert_array_equal(
        logits(small_model(lora=LORA), params, TOKENS), logits(small_model(), unflatten_dict(base, sep="/"), TOKENS)
    )


@pytest.mark.parametrize("targets", [PROJECTIONS, ("query", "down")])
def test_merged_and_unmerged_logits_agree(targets):
    config = small_model(lora=dataclasses.replace(LORA, targets=targets), num_kv_heads=2)
    params = trained(config)
    merged = merge(params, config.lora)
    assert set(flatten_dict(merged, sep="/")) == set(parameter_shapes(small_model(num_kv_heads=2)))
    found = logits(config, params, TOKENS)
    np.testing.assert_allclose(
        found, logits(dataclasses.replace(config, lora=None), merged, TOKENS), atol=1e-5 * float(jnp.abs(found).max())
    )
    base = {**params, "layers": merge({"layers": params["layers"]}, dataclasses.replace(LORA, alpha=1e-9))["layers"]}
    assert float(jnp.abs(found - logits(dataclasses.replace(config, lora=None), base, TOKENS)).max()) > 1e-2


def test_cached_decoding_applies_adapters():
    config = small_model(lora=LORA)
    params, prompt = trained(config), [5, 9, 2]
    requests = [Request(prompt, max_new_tokens=6)]
    (one,) = Engine(Qwen(config), params).generate(requests)
    plain = dataclasses.replace(config, lora=None)
    (other,) = Engine(Qwen(plain), merge(params, LORA)).generate(requests)
    assert list(one.tokens) == list(other.tokens)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@hypothesis.given(
    equation=st.sampled_from(["bld,dhk->bhlk", "bld,dhk->blhk", "bld,df->blf", "bhlk,hkd->bld", "blf,fd->bld"]),
    sizes=st.fixed_dictionaries({axis: st.integers(1, 4) for axis in "bldhkfr"}),
    layers=st.integers(0, 2),
    scale=st.floats(0.1, 4.0),
)
@hypothesis.settings(max_examples=40)
def test_the_two_products_are_that_of_the_merged_kernel(equation, sizes, layers, scale):
    random = np.random.default_rng(0)

    def make(axes, *before):
        return random.standard_normal((*before, *(sizes[axis] for axis in axes)))

    down, up, inputs = adapter_equations(equation)
    of_x, of_kernel = equation.split("->")[0].split(",")
    x, stack = make(of_x), (layers,) if layers else ()
    kernel, a, b = (
        make(of_kernel, *stack),
        make(of_kernel[:inputs] + "r", *stack),
        make("r" + of_kernel[inputs:], *stack),
    )
    merged = merged_kernel(kernel, a, b, scale)
    assert merged.dtype == np.float32 and merged.shape == kernel.shape
    for index in np.ndindex(*stack):
        expected = np.einsum(equation, x, kernel[index]) + scale * np.einsum(up, np.einsum(down, x, a[index]), b[index])
        np.testing.assert_allclose(np.einsum(equation, x, merged[index]), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_rounds_once_and_an_export_is_what_it_rounds_to():
    """Kernel of ±1 and a product of 0.003: in bfloat16 half of the sums stay where they were."""
    lora = LoraConfig(rank=1, alpha=1.0, targets=("up",))
    module = Projection("bld,df->blf", (64, 1), ("embed", "mlp"), 0.02, jnp.bfloat16, lora=lora, name="up")
    kernel = np.where(np.arange(64) % 2, 1.0, -1.0)[:, None].astype(np.float32)
    params = {"kernel": kernel, "lora_a": np.full((64, 1), 0.003, np.float32), "lora_b": np.ones((1, 1), np.float32)}
    x = jnp.ones((1, 1, 64), jnp.bfloat16)
    adapted = module.apply({"params": params}, x)
    plain = module.clone(lora=None)
    exported = merge(params, lora)["kernel"].astype(jnp.bfloat16).astype(np.float32)
    merged = plain.apply({"params": {"kernel": exported}}, x)
    assert (float(adapted[0, 0, 0]), float(merged[0, 0, 0])) == (pytest.approx(0.1924, abs=1e-4), 0.125)


def test_dropout_of_the_adapters_needs_a_key_and_is_off_when_deterministic():
    config = small_model(lora=dataclasses.replace(LORA, dropout=0.5))
    params = trained(config)
    assert Qwen(config).has_dropout and not Qwen(small_model(lora=LORA)).has_dropout
    np.testing.assert_array_equal(logits(config, params, TOKENS), logits(small_model(lora=LORA), params, TOKENS))
    drawn = [
        logits(config, params, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert float(jnp.abs(drawn[0] - drawn[2]).max()) > 1e-3


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 4}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_every_axis_of_an_adapter_has_a_name_and_meshes_agree(axes):
    config = small_model(lora=LORA)
    boxed = abstract_params(Qwen(config))
    for path, box in flatten_dict(boxed, sep="/").items():
        assert None not in box.names and len(box.names) == len(box.value.shape), path
    params, mesh = trained(config), make_mesh(MeshConfig(**axes))
    tokens = jnp.tile(TOKENS[:, :8], (4, 1))

    def loss(params):
        return jnp.square(Qwen(config).apply({"params": params}, tokens)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(params)
    with use_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(boxed, mesh))
        found = jax.jit(jax.value_and_grad(loss))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank must be a positive integer, found 0"),
        ({"rank": 4, "alpha": -1}, "LoraConfig.alpha must be a positive number, found -1"),
        ({"rank": 4, "dropout": 1.0}, r"LoraConfig.dropout must be in \[0, 1\), found 1.0"),
        (
            {"rank": 4, "targets": ("lm_head",)},
            "found 'lm_head'. Embedding and output of the vocabulary are trained whole",
        ),
        ({"rank": 4, "targets": ()}, "LoraConfig.targets is empty"),
        ({"rank": 4, "targets": None}, "LoraConfig.targets must be a list of query, .*; found None"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_a_configuration_survives_json():
    config = small_model(lora=LoraConfig(8, targets=["down", "query"]))
    assert config.lora.targets == ("query", "down")
    assert ModelConfig(**config.to_dict()) == config
