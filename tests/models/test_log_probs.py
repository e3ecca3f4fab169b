"""Log-probabilities and cross-entropy against torch's, whole and in chunks, on one device and on a mesh."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.models import log_probs
from qwen_jax.models.nucleus import nucleus_threshold
from qwen_jax.sharding import MeshConfig, make_mesh, use_mesh


def arrays(rows=4, length=12, width=8, vocabulary=50):
    """Hidden states, kernel, targets, and cotangents of log-probabilities and entropy."""
    random = np.random.default_rng(0)
    hidden, kernel = (
        random.standard_normal((rows, length, width), np.float32),
        random.standard_normal((width, vocabulary), np.float32),
    )
    targets = random.integers(0, vocabulary, (rows, length))
    return hidden, kernel / 4, targets, *random.standard_normal((2, rows, length), np.float32)


def statistics_and_gradients(hidden, kernel, targets, cotangent, entropy_cotangent, temperature):
    """(statistics, gradients by hidden and kernel) under arbitrary cotangents."""

    def of(hidden, kernel):
        found = log_probs.token_statistics(hidden, kernel, targets, temperature=temperature, with_entropy=True)
        return jnp.sum(cotangent * found.log_probs) + jnp.sum(entropy_cotangent * found.entropy), found

    return jax.jit(jax.grad(of, (0, 1), has_aux=True))(hidden, kernel)[::-1]


def chunks_of(length, monkeypatch):
    monkeypatch.setattr(log_probs, "_chunk_length", lambda rows, positions, vocab_size: min(length, positions))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, 12])
def test_log_probabilities_entropy_and_gradients_equal_torch(chunk, temperature, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with torch's log_softmax")
    chunks_of(chunk, monkeypatch)
    hidden, kernel, targets, *cotangents = arrays()
    found, gradients = statistics_and_gradients(hidden, kernel, targets, *cotangents, temperature)
    h, k = (torch.tensor(x, requires_grad=True) for x in (hidden, kernel))
    logs = torch.log_softmax(h @ k / temperature, -1)
    picked = logs.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    sum((torch.tensor(c) * x).sum() for c, x in zip(cotangents, (picked, entropy), strict=True)).backward()
    for ours, theirs in (
        (found.log_probs, picked.detach()),
        (found.entropy, entropy.detach()),
        *zip(gradients, (h.grad, k.grad), strict=True),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.most_likely, (hidden @ kernel).argmax(-1) == targets)


@pytest.mark.parametrize("axes", [dict(fsdp=2, tensor=2, sequence=2), dict(data=4, tensor=2)])
def test_a_mesh_gives_the_same(axes, monkeypatch):
    chunks_of(3, monkeypatch)
    expected, wanted = statistics_and_gradients(*arrays(), 0.7)
    mesh = make_mesh(MeshConfig(**axes))
    with use_mesh(mesh):
        found, gradients = statistics_and_gradients(*arrays(), 0.7)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), (found, gradients), (expected, wanted))


def compiled_log_probs(tokens, at_a_time, monkeypatch):
    """The log-probabilities over a vocabulary of 4,096 and their gradients, compiled with so many logits at a time."""
    monkeypatch.setattr(log_probs, "LOGITS_AT_A_TIME", at_a_time)

    def pulled_back(hidden, kernel, targets, cotangent):
        found, pull = jax.vjp(lambda h, k: log_probs.token_log_probs(h, k, targets), hidden, kernel)
        return found, pull(cotangent)

    shapes = (
        ((4, tokens // 4, 16), jnp.float32),
        ((16, 4096), jnp.float32),
        ((4, tokens // 4), jnp.int32),
        ((4, tokens // 4), jnp.float32),
    )
    return jax.jit(pulled_back).lower(*[jax.ShapeDtypeStruct(*shape) for shape in shapes]).compile()


def test_the_memory_of_log_probabilities_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    few, many = 256, 4096
    whole, chunked = (
        [compiled_log_probs(tokens, limit, monkeypatch).memory_analysis().temp_size_in_bytes for tokens in (few, many)]
        for limit in (2**40, few * 4096)
    )
    all_logits = 4 * many * 4096
    assert whole[1] > all_logits
    assert chunked[1] < chunked[0] + 0.02 * all_logits < 0.3 * all_logits


def test_bfloat16_differs_by_its_rounding_only():
    hidden, kernel, targets, *_ = arrays()
    exact = log_probs.token_log_probs(hidden, kernel, targets)
    rounded = log_probs.token_log_probs(jnp.asarray(hidden, jnp.bfloat16), kernel, targets)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05)


@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients_equal_torch(chunked, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with torch's cross_entropy")
    if chunked:
        monkeypatch.setattr(log_probs, "_chunk_length", lambda rows, length, vocab_size: 4)
    random = np.random.default_rng(0)
    hidden, kernel = random.standard_normal((3, 12, 8), np.float32), random.standard_normal((8, 50), np.float32)
    targets, weights = random.integers(0, 50, (3, 12)), (random.random((3, 12)) < 0.7).astype(np.float32)

    def ours(hidden, kernel):
        sums = log_probs.cross_entropy_sums(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights))
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
    monkeypatch.setattr(log_probs, "LOGITS_AT_A_TIME", at_a_time)

    def loss(hidden, kernel, targets, weights):
        return log_probs.cross_entropy_sums(hidden, kernel, targets, weights)["loss"]

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
            lambda hidden, kernel: factor * log_probs.cross_entropy_sums(hidden, kernel, targets, weights)["loss"],
            (0, 1),
        )(hidden, kernel)

    for tripled, once in zip(gradients(3.0), gradients(1.0), strict=True):
        np.testing.assert_allclose(tripled, 3 * once, rtol=1e-6)


def nucleus_and_gradients(hidden, kernel, targets, cotangents, temperature, top_p):
    """(statistics, gradients by hidden and kernel); the cotangents are of log-probabilities, entropy, nucleus."""

    def of(hidden, kernel):
        found = log_probs.token_statistics(
            hidden, kernel, targets, temperature=temperature, with_entropy=True, top_p=top_p
        )
        inside = jnp.isfinite(found.nucleus_log_probs)
        nucleus = jnp.where(inside, found.nucleus_log_probs, 0.0)
        terms = (found.log_probs, found.entropy, nucleus)
        return sum(jnp.sum(c * x) for c, x in zip(cotangents, terms, strict=True)), found

    return jax.jit(jax.grad(of, (0, 1), has_aux=True))(hidden, kernel)[::-1]


@pytest.mark.parametrize("chunk", [4, 12])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 0.5), (1.3, 0.05), (1.0, 1.0)])
def test_log_probabilities_in_the_nucleus_equal_those_of_transformers(chunk, temperature, top_p, monkeypatch):
    """Values and gradients, the nucleus taken as constant; a token outside has minus infinity and no gradient."""
    torch = pytest.importorskip("torch", reason="compares with transformers' warper")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' warper")
    chunks_of(chunk, monkeypatch)
    hidden, kernel, targets, *cotangents = arrays()
    kernel = kernel * 4
    cotangents.append(np.random.default_rng(1).standard_normal(targets.shape, np.float32))
    found, gradients = nucleus_and_gradients(hidden, kernel, targets, cotangents, temperature, top_p)
    h, k = (torch.tensor(x, requires_grad=True) for x in (hidden, kernel))
    logits = h @ k / temperature
    filtered = logits
    if top_p < 1:
        flat = logits.detach().reshape(-1, 50)
        outside = transformers.TopPLogitsWarper(top_p)(None, flat).isneginf().reshape(logits.shape)
        filtered = logits.masked_fill(outside, -torch.inf)
    place = torch.tensor(targets)[..., None]
    picked = torch.log_softmax(filtered, -1).gather(-1, place)[..., 0]
    logs = torch.log_softmax(logits, -1)
    entropy = -(logs.exp() * logs).sum(-1)
    inside = torch.isfinite(picked)
    assert top_p == 1 or 0 < inside.sum() < inside.numel()
    terms = (logs.gather(-1, place)[..., 0], entropy, torch.where(inside, picked, 0.0))
    sum((torch.tensor(c) * x).sum() for c, x in zip(cotangents, terms, strict=True)).backward()
    np.testing.assert_array_equal(np.isfinite(found.nucleus_log_probs), inside.numpy())
    np.testing.assert_allclose(found.nucleus_log_probs, picked.detach().numpy(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, (h.grad, k.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [dict(fsdp=2, tensor=2, sequence=2), dict(data=4, tensor=2)])
def test_the_nucleus_is_the_same_on_a_mesh(axes, monkeypatch):
    chunks_of(3, monkeypatch)
    hidden, kernel, targets, *cotangents = arrays()
    inputs = (hidden, kernel * 4, targets, [*cotangents, cotangents[0]], 0.7, 0.8)
    expected, wanted = nucleus_and_gradients(*inputs)
    with use_mesh(make_mesh(MeshConfig(**axes))):
        found, gradients = nucleus_and_gradients(*inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), (found, gradients), (expected, wanted))


@hypothesis.given(logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40), top_p=st.floats(0.01, 0.995))
def test_the_nucleus_is_the_smallest_set_that_is_probable_enough(logits, top_p):
    logits = np.asarray(logits, np.float32)
    threshold = float(nucleus_threshold(jnp.asarray(logits), jax.nn.logsumexp(jnp.asarray(logits)), top_p))
    probabilities = np.exp(logits.astype(float) - np.logaddexp.reduce(logits.astype(float)))
    inside = logits > threshold
    # Tokens about as probable as the last one may be in or out, and sums are rounded.
    assert probabilities[inside].sum() >= top_p - 1e-4
    close = np.abs(logits - logits[inside].min()) < 1e-5
    assert probabilities[inside & ~close].sum() < top_p + 1e-4
