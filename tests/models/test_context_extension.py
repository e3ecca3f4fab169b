"""Context extension at inference (report 2.3.2): what it leaves alone, what it depends on, what a window hides."""

import json
import math

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.configuration import load_gin
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.decoding import DecodingCache, decode, decoding_logits, unstack_layers
from qwen_jax.models.positions import dynamic_ntk_alpha, logn_scale, rotary_angles
from qwen_jax.models.transformer import Qwen
from tests.fakes import outputs

ALL = {"use_dynamic_ntk": True, "use_logn": True, "window_sizes": (16, 24, 0)}


def config(**changes) -> ModelConfig:
    sizes = dict(vocab_size=97, hidden_size=48, num_layers=3, num_heads=4, ffn_size=80, head_dim=12, context_length=16)
    return ModelConfig(**{**sizes, "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def params():
    """Weights large enough that a change of attention changes the logits."""
    shapes = nn.meta.unbox(
        jax.eval_shape(lambda: Qwen(config()).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    )
    random = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(random.standard_normal(leaf.shape) * 0.2 + ("scale" in str(path)), jnp.float32),
        shapes,
    )


def tokens_of(rows: int, length: int):
    return jnp.asarray(np.random.default_rng(3).integers(0, 97, (rows, length)), jnp.int32)


def inference_logits(model, params, tokens, lengths=None):
    hidden = outputs(model, params, tokens, lengths, method=Qwen.inference_hidden_states)
    return np.asarray(outputs(model, params, hidden, method=Qwen.logits))


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=20, max_size=20), st.sampled_from([16, 48, 2048, 8192, 32768]))
def test_alpha_is_the_released_formula(lengths, trained):
    lengths = [*lengths, trained, trained + 1, 8 * trained, 8 * trained + 1]
    formula = [max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1) for length in lengths]
    np.testing.assert_array_equal(dynamic_ntk_alpha(jnp.asarray(lengths), trained), formula)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_alpha():
    position = jnp.asarray([[1], [1]])
    cos, sin = rotary_angles(position, 128, 10_000.0, jnp.asarray([1.0, 7.0]))
    plain, stretched = np.arctan2(sin, cos)[:, 0]
    np.testing.assert_allclose(stretched[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(stretched[-1], plain[-1] / 7, rtol=1e-5)
    np.testing.assert_allclose(plain, np.arctan2(*reversed(rotary_angles(position, 128, 10_000.0)))[0, 0], rtol=1e-6)


def test_logn_grows_with_the_logarithm_of_the_position_past_the_training_length():
    scale = np.asarray(logn_scale(jnp.arange(256)[None], 16))[0]
    assert (scale[:16] == 1).all() and (np.diff(scale[15:]) > 0).all()
    np.testing.assert_allclose(scale[[31, 63, 255]], [5 / 4, 6 / 4, 8 / 4], rtol=1e-6)


def test_training_is_the_same_program_bit_for_bit(params):
    tokens = tokens_of(2, 40)

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, tokens) ** 2)))

    plain, extended = (loss(Qwen(config(**changes))) for changes in ({}, ALL))
    assert plain.lower(params).as_text() == extended.lower(params).as_text()
    for one, other in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(extended(params)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_changes_up_to_the_training_length(params):
    tokens = tokens_of(2, 16)
    whole = outputs(Qwen(config()), params, tokens)
    np.testing.assert_allclose(inference_logits(Qwen(config(**ALL)), params, tokens), whole, atol=1e-4)


@pytest.mark.parametrize("changes", [{"use_dynamic_ntk": True}, {"use_logn": True}, {"window_sizes": [8, 8, 0]}])
def test_each_switch_acts_alone_past_it(params, changes):
    tokens = tokens_of(2, 40)
    whole = outputs(Qwen(config()), params, tokens)
    np.testing.assert_allclose(inference_logits(Qwen(config()), params, tokens), whole, atol=1e-4)
    assert np.abs(inference_logits(Qwen(config(**changes)), params, tokens) - whole)[:, 16:].max() > 1e-2


def test_a_window_hides_what_lies_before_it(params):
    """Windows of 3 and 2 positions in the lower layers, 4 in the highest: 2 + 1 + 3 positions back, no further."""
    model = Qwen(config(window_sizes=(3, 2, 4)))
    tokens = tokens_of(1, 20)
    changed = np.abs(
        inference_logits(model, params, tokens) - inference_logits(model, params, tokens.at[0, 5].add(1) % 97)
    ).max(-1)[0]
    assert (changed[:5] == 0).all() and (changed[5:12] > 0).all() and (changed[12:] == 0).all()


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "window_sizes": (5, 9, 0)}])
def test_unequal_prompts_decode_like_the_whole_pass_of_each(params, changes):
    """Prompts of 20 and 36 tokens in one padded batch; alpha is 3 for the one and 7 for the other, all the way."""
    if changes:
        params = jax.tree.map(lambda leaf: leaf, params)
        for name in ("key", "value"):
            part = params["layers"]["attention"][name]
            params["layers"]["attention"][name] = {"kernel": part["kernel"][:, :, :2], "bias": part["bias"][:, :2]}
    model = Qwen(config(**{**ALL, **changes}))
    lengths, new = jnp.asarray([20, 36]), 12
    tokens = tokens_of(2, 48)
    # Within the same doubling of the length, the whole pass has the alpha of the prompt.
    whole = [inference_logits(model, params, tokens[row : row + 1, : n + new])[0] for row, n in enumerate((20, 36))]

    @jax.jit
    def step(tokens, starts, cache):
        hidden, cache = decode(model.config, layered, tokens, starts, cache)
        return decoding_logits(model.config, layered, hidden), cache

    layered = unstack_layers(params, model.config.num_layers)
    prompt = jnp.where(jnp.arange(40) < lengths[:, None], tokens[:, :40], 0)
    cache = DecodingCache.empty(model.config, 2, 48, lengths)
    logits, cache = step(prompt, jnp.zeros(2, int), cache)
    padded = inference_logits(model, params, prompt, lengths)
    for row, length in enumerate((20, 36)):
        np.testing.assert_allclose(logits[row, :length], whole[row][:length], atol=1e-4)
        np.testing.assert_allclose(padded[row, :length], whole[row][:length], atol=1e-4)
    for index in range(new):
        at = lengths + index
        logits, cache = step(jnp.take_along_axis(tokens, at[:, None], axis=1), at, cache)
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], whole[row][int(at[row])], atol=1e-4)


def test_dynamic_ntk_must_know_the_prompt():
    with pytest.raises(ValueError, match="prompt_lengths"):
        DecodingCache.empty(config(use_dynamic_ntk=True), 1, 8)


def test_windows_come_from_gin_and_survive_json():
    load_gin(["gin/models/tiny.gin"], ["ModelConfig.window_sizes=[256, 512, 1024, 0]", "ModelConfig.use_logn=True"])
    found = gin.get_configurable("ModelConfig")()
    gin.clear_config()
    assert found.window_sizes == (256, 512, 1024, 0) and found.use_logn
    assert ModelConfig(**json.loads(json.dumps(found.to_dict()))) == found
    assert hash(Qwen(found)) == hash(Qwen(found))


def test_generation_may_reach_eight_training_lengths_with_dynamic_ntk_only():
    assert config(use_logn=True, window_sizes=(4, 4, 4)).inference_length == 16
    assert config(use_dynamic_ntk=True).inference_length == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window_sizes": (4, 4)}, "each of the 3 layers, found 2"),
        ({"window_sizes": (4, -1, 4)}, "found -1"),
        ({"window_sizes": (4, 2.5, 4)}, "found 2.5"),
        ({"use_logn": True, "context_length": 1}, "use_logn"),
        ({"window_sizes": 256}, "window_sizes"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)
