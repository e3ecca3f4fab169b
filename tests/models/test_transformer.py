"""The decoder: sizes, causality, packing, dropout, cached decoding."""

import functools

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.configuration import load_gin
from qwen_jax.models.build import parameter_count
from qwen_jax.models.config import REMAT_POLICIES, ModelConfig
from qwen_jax.models.decoding import DecodingCache, decode, decoding_logits, unstack_layers
from qwen_jax.models.transformer import Qwen, abstract_params
from tests.fakes import outputs, random_params

RELEASED = {"1_8b": 1_836_828_672, "7b": 7_721_324_544, "14b": 14_167_290_880, "72b": 72_287_920_128}


def tiny_config(**changes) -> ModelConfig:
    values = dict(
        vocab_size=97,
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        ffn_size=80,
        head_dim=12,
        context_length=64,
        dtype="float32",
    )
    return ModelConfig(**{**values, **changes})


def make(config: ModelConfig):
    return Qwen(config), random_params(config)


@functools.partial(jax.jit, static_argnames=("model", "deterministic"))
def forward(model, params, tokens, deterministic=True, **arguments):
    return model.apply({"params": params}, tokens, deterministic=deterministic, **arguments)


def tokens_of(rows: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, (rows, length)), jnp.int32)


@pytest.mark.parametrize("size", RELEASED)
def test_parameter_counts_equal_the_released_ones(size):
    load_gin([f"gin/models/{size}.gin"])
    config = gin.get_configurable("ModelConfig")()
    assert parameter_count(config) == RELEASED[size]
    # From shapes: nothing was allocated.
    leaves = jax.tree.leaves(nn.meta.unbox(abstract_params(Qwen(config))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.float32 for leaf in leaves)


def test_a_token_changes_nothing_before_it():
    model, params = make(tiny_config())
    tokens = tokens_of(2, 20)
    changed = tokens.at[:, 11].add(1) % 97
    one, other = (forward(model, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(one[:, :11], other[:, :11])
    assert float(jnp.abs(one[:, 11:] - other[:, 11:]).min(axis=(0, 1)).max()) > 1e-3


def test_logits_are_float32_whatever_the_compute_dtype_and_params_stay_float32():
    exact_model, params = make(tiny_config())
    model = Qwen(tiny_config(dtype="bfloat16"))
    tokens = tokens_of(2, 20)
    logits, exact = forward(model, params, tokens), forward(exact_model, params, tokens)
    assert logits.dtype == exact.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert float(jnp.max(jnp.abs(logits - exact)) / jnp.max(jnp.abs(exact))) < 0.05


def test_rotary_angles_stay_exact_in_bfloat16_compute():
    """At position 30,000 bfloat16 angles would be off by tens of radians; the released code keeps them in float32."""
    from qwen_jax.models.positions import rotary_angles

    cos, sin = rotary_angles(jnp.asarray([[30_000]]), 128, 10_000.0)
    exact = 30_000 / 10_000.0 ** (np.arange(0, 128, 2) / 128)
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 0], np.cos(exact), atol=4e-3)
    np.testing.assert_allclose(sin[0, 0], np.sin(exact), atol=4e-3)


def test_packed_documents_do_not_see_each_other():
    model, params = make(tiny_config())
    first, second = tokens_of(1, 7, 1), tokens_of(1, 9, 2)
    packed = forward(
        model,
        params,
        jnp.concatenate([first, second], 1),
        segment_ids=jnp.asarray([[1] * 7 + [2] * 9]),
        positions=jnp.asarray([[*range(7), *range(9)]]),
    )
    apart = [forward(model, params, part) for part in (first, second)]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=2e-5)


def test_dropout_acts_only_when_training_and_follows_its_key():
    model, params = make(tiny_config(embedding_dropout=0.1, attention_dropout=0.1))
    tokens = tokens_of(2, 20)

    def run(seed):
        return forward(model, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    quiet = forward(model, params, tokens)
    np.testing.assert_array_equal(quiet, forward(Qwen(tiny_config()), params, tokens))
    np.testing.assert_array_equal(run(0), run(0))
    assert float(jnp.abs(run(0) - run(1)).max()) > 1e-2
    assert float(jnp.abs(run(0) - quiet).max()) > 1e-2


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"tie_embeddings": True}, {"qkv_bias": False}])
def test_cached_decoding_gives_the_logits_of_the_whole_pass(changes):
    model, params = make(tiny_config(**changes))
    tokens = tokens_of(2, 24)
    whole = forward(model, params, tokens)

    @jax.jit
    def step(tokens, starts, cache):
        hidden, cache = decode(model.config, layered, tokens, starts, cache)
        return decoding_logits(model.config, layered, hidden), cache

    layered = unstack_layers(params, model.config.num_layers)
    cache = DecodingCache.empty(model.config, 2, 32)
    # A prompt of 10 padded to 16: what padding wrote must not be seen later.
    prompt = jnp.where(jnp.arange(16) < 10, tokens[:, :16], 0)
    logits, cache = step(prompt, jnp.zeros(2, int), cache)
    np.testing.assert_allclose(logits[:, :10], whole[:, :10], atol=2e-5)
    for position in range(10, 24):
        logits, cache = step(tokens[:, position : position + 1], jnp.full(2, position), cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, position], atol=2e-5)


def gradient(policy):
    model, params = make(tiny_config(remat=policy))
    tokens = tokens_of(2, 20)
    return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens) ** 2)))(params)


@pytest.fixture(scope="module")
def gradient_of_what_is_kept():
    return gradient("none")


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none", "offload"}))
def test_rematerialization_changes_no_gradient(remat, gradient_of_what_is_kept):
    pairs = zip(jax.tree.leaves(gradient_of_what_is_kept), jax.tree.leaves(gradient(remat)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


def test_offloading_where_there_is_no_host_is_refused():
    model, params = make(tiny_config(remat="offload"))
    with pytest.raises(ValueError, match="'offload' needs TPUs or GPUs"):
        forward(model, params, tokens_of(1, 8))


def test_initial_weights_have_the_released_spread():
    config = ModelConfig(vocab_size=2000, hidden_size=256, num_layers=4, num_heads=2, ffn_size=512)
    params = nn.meta.unbox(jax.jit(Qwen(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    layers = params["layers"]
    for leaf, std in (
        (params["token_embedding"], 0.02),
        (params["output"], 0.02),
        (layers["attention"]["query"]["kernel"], 0.02),
        (layers["mlp"]["up"]["kernel"], 0.02),
        (layers["mlp"]["down"]["kernel"], 0.02 / 8**0.5),
        (layers["attention"]["output"]["kernel"], 0.02 / 8**0.5),
    ):
        assert abs(float(jnp.std(leaf)) / std - 1) < 0.02
    assert float(jnp.abs(layers["attention"]["query"]["bias"]).max()) == 0
    # Layers are drawn independently.
    assert float(jnp.abs(layers["mlp"]["up"]["kernel"][0] - layers["mlp"]["up"]["kernel"][1]).max()) > 0.01


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, found 0"),
        ({"head_dim": 13}, "head_dim"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"attention_kernel": "flash"}, "attention_kernel"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, found -1.0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be a positive number"),
        ({"init_std": "small"}, "init_std must be a positive number, found 'small'"),
        ({"attention_dropout": 1.5}, r"attention_dropout must be in \[0, 1\), found 1.5"),
        ({"embedding_dropout": -0.1}, r"embedding_dropout must be in \[0, 1\), found -0.1"),
        ({"tie_embeddings": "false"}, "tie_embeddings must be True or False, found 'false'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)


def test_a_scalar_head_gives_one_number_for_each_position():
    model, params = make(tiny_config(head="scalar"))
    assert params["score"].shape == (48, 1) and "output" not in params
    tokens = tokens_of(2, 12)
    score = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="scalars"))
    scalars = score(params, tokens)
    hidden = outputs(model, params, tokens, method="hidden_states")
    np.testing.assert_allclose(scalars, hidden @ params["score"][:, 0], rtol=1e-5)
    changed = score(params, tokens.at[:, 7].set((tokens[:, 7] + 1) % 97))
    np.testing.assert_array_equal(scalars[:, :7], changed[:, :7])
    assert (scalars[:, 7:] != changed[:, 7:]).all()
    with pytest.raises(ValueError, match="no output projection"):
        model.apply({"params": params}, method="output_kernel")
    with pytest.raises(ValueError, match="no scalar head"):
        plain, plain_params = make(tiny_config())
        plain.apply({"params": plain_params}, tokens, method="scalars")
