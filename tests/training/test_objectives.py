"""Which tokens the loss counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models.transformer import Qwen
from qwen_jax.training import objectives
from tests.fakes import small_model


@pytest.fixture(scope="module")
def model_and_params():
    model = Qwen(small_model())
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def loss_of(model_and_params, batch):
    model, params = model_and_params
    loss, sums = jax.jit(lambda params, batch: objectives.next_token_loss(model, params, batch, None))(params, batch)
    return float(loss), float(sums["weight"])


def test_only_weighted_tokens_count_and_each_is_predicted_from_the_one_before(model_and_params):
    model, params = model_and_params
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 16)), jnp.int32)
    weights = np.zeros((2, 16), np.float32)
    weights[0, 5], weights[1, 15], weights[1, 0] = 1, 1, 1  # token 0 of a row has nothing before it
    loss, weight = loss_of(model_and_params, {"tokens": tokens, "loss_weights": weights})
    logs = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, tokens))
    assert weight == 2
    np.testing.assert_allclose(loss, -float(logs[0, 4, tokens[0, 5]] + logs[1, 14, tokens[1, 15]]), rtol=1e-5)


def test_the_first_token_of_a_packed_document_is_not_predicted_from_the_one_before(model_and_params):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 64, (1, 16)), jnp.int32)
    segments = jnp.asarray([[1] * 6 + [2] * 10], jnp.int32)
    positions = jnp.asarray([[*range(6), *range(10)]], jnp.int32)
    batch = {"tokens": tokens, "loss_weights": jnp.ones((1, 16)), "segment_ids": segments, "positions": positions}
    packed, weight = loss_of(model_and_params, batch)
    first = loss_of(model_and_params, {"tokens": tokens[:, :6], "loss_weights": jnp.ones((1, 6))})
    second = loss_of(model_and_params, {"tokens": tokens[:, 6:], "loss_weights": jnp.ones((1, 10))})
    assert weight == 14 == first[1] + second[1]
    np.testing.assert_allclose(packed, first[0] + second[0], rtol=1e-5)
