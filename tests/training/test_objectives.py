"""The loss against torch's, whole and in chunks; which tokens it counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models.transformer import Qwen
from qwen_jax.training import objectives
from tests.fakes import small_model


@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients_equal_torch(chunked, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with torch's cross_entropy")
    if chunked:
        monkeypatch.setattr(objectives, "_chunk_length", lambda rows, length, vocab_size: 4)
    random = np.random.default_rng(0)
    hidden, kernel = random.standard_normal((3, 12, 8), np.float32), random.standard_normal((8, 50), np.float32)
    targets, weights = random.integers(0, 50, (3, 12)), (random.random((3, 12)) < 0.7).astype(np.float32)

    def ours(hidden, kernel):
        sums = objectives.cross_entropy_sums(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights))
        return sums["loss"], sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, kernel)
    h, k = (torch.tensor(x, requires_grad=True) for x in (hidden, kernel))
    each = torch.nn.functional.cross_entropy((h @ k).mT, torch.tensor(targets), reduction="none")
    theirs = (each * torch.tensor(weights)).sum()
    theirs.backward()
    np.testing.assert_allclose(float(loss), theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], h.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(gradients[1], k.grad.numpy(), atol=1e-5)
    assert float(sums["weight"]) == weights.sum()
    assert float(sums["correct"]) == ((hidden @ kernel).argmax(-1) == targets)[weights > 0].sum()


def compiled_loss(tokens, at_a_time, monkeypatch, gradients=True):
    """The loss of a vocabulary of 4,096 and its gradients, compiled with so many logits at a time."""
    monkeypatch.setattr(objectives, "LOGITS_AT_A_TIME", at_a_time)

    def loss(hidden, kernel, targets, weights):
        return objectives.cross_entropy_sums(hidden, kernel, targets, weights)["loss"]

    shapes = (
        ((4, tokens // 4, 16), jnp.float32),
        ((16, 4096), jnp.float32),
        ((4, tokens // 4), jnp.int32),
        ((4, tokens // 4), jnp.float32),
    )
    function = jax.value_and_grad(loss, (0, 1)) if gradients else loss
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(*shape) for shape in shapes]).compile()


def test_the_memory_of_the_loss_in_chunks_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    few, many = 256, 4096
    whole, chunked = (
        [compiled_loss(tokens, limit, monkeypatch).memory_analysis().temp_size_in_bytes for tokens in (few, many)]
        for limit in (2**40, few * 4096)
    )
    all_logits = 4 * many * 4096
    assert whole[1] > all_logits
    # What grows in chunks is the gradient of the hidden states, 16 numbers of a token and not 4,096.
    assert chunked[1] < chunked[0] + 0.02 * all_logits < 0.25 * all_logits


def test_a_loss_without_gradients_computes_none(monkeypatch):
    with_gradients, without = (
        compiled_loss(512, 2**40, monkeypatch, gradients).cost_analysis()["flops"] for gradients in (True, False)
    )
    product = 2 * 512 * 16 * 4096
    assert product < without < 1.7 * product and with_gradients - without > 1.9 * product


def test_gradients_follow_what_the_loss_is_multiplied_by(monkeypatch):
    random = np.random.default_rng(0)
    hidden, kernel = random.standard_normal((2, 8, 4), np.float32), random.standard_normal((4, 30), np.float32)
    targets, weights = random.integers(0, 30, (2, 8)), np.ones((2, 8), np.float32)

    def gradients(factor):
        return jax.grad(
            lambda hidden, kernel: factor * objectives.cross_entropy_sums(hidden, kernel, targets, weights)["loss"],
            (0, 1),
        )(hidden, kernel)

    for tripled, once in zip(gradients(3.0), gradients(1.0), strict=True):
        np.testing.assert_allclose(tripled, 3 * once, rtol=1e-6)


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
