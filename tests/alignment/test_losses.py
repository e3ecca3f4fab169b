"""Losses of PPO and GRPO against an independent computation, trl and verl, and gradients that stay finite."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.experience import token_weights
from qwen_jax.alignment.grpo import GRPOConfig
from qwen_jax.alignment.losses import clipped_policy_loss, clipped_value_loss
from qwen_jax.alignment.ppo import PPOConfig
from qwen_jax.models.transformer import Qwen
from tests.fakes import outputs, small_model


@pytest.fixture(scope="module")
def recorded(root):
    """Functions of trl 1.12.0 and verl 0.9.1, run by tests/golden/rlhf/record.py."""
    found = json.loads((root / "tests/golden/rlhf/recorded.json").read_text())
    found["inputs"] = {name: np.asarray(value, np.float32) for name, value in found["inputs"].items()}
    return found


def weighted(per_token, mask, aggregation="token"):
    """The loss of a minibatch as the trainer divides it."""
    return float((np.asarray(per_token) * token_weights(mask, aggregation, mask.shape[1])).sum() / len(mask))


@pytest.mark.parametrize("peer", ["trl", "verl"])
def test_clipped_losses_equal_the_peers(recorded, peer):
    given, found = recorded["inputs"], recorded[peer]
    mask, log_ratio = given["mask"], given["new"] - given["log_probs"]
    policy, _ = clipped_policy_loss(jnp.asarray(log_ratio), jnp.asarray(found["whitened"]), 0.2, 0.2)
    assert weighted(policy, mask) == pytest.approx(found["policy_loss"], rel=1e-4, abs=1e-6)
    # trl's value loss has one more position, that of its score.
    wider = np.asarray(found.get("mask_p1", mask), np.float32)
    value, _ = clipped_value_loss(
        *(jnp.asarray(x) for x in (given["new_values"] * wider, given["values"] * wider, found["returns"])), 0.15
    )
    assert weighted(value, wider) == pytest.approx(found["value_loss"], rel=1e-5)


@pytest.mark.parametrize(("theirs", "ours"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_grpo_losses_equal_trl(recorded, theirs, ours):
    given = recorded["inputs"]
    advantages = jnp.asarray(given["group_advantages"][:, None])
    loss, _ = clipped_policy_loss(jnp.asarray(given["new"] - given["log_probs"]), advantages, 0.2, 0.28)
    difference = given["reference"] - given["new"]
    k3 = np.exp(difference) - difference - 1
    assert weighted(loss + 0.04 * k3, given["mask"], ours) == pytest.approx(recorded["grpo"][theirs], rel=1e-5)


def test_clipping_written_down():
    loss, clipped = clipped_policy_loss(
        jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5])), jnp.asarray([1, -1, 1, -1]), 0.2, 0.2
    )
    np.testing.assert_allclose(loss, [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    assert clipped.tolist() == [True, False, False, True]
    # A value that moved by 1 towards its return counts as if it had moved by 0.15.
    value, clipped = clipped_value_loss(jnp.asarray([1.0, 0.1]), jnp.zeros(2), jnp.asarray([1.0, 1.0]), 0.15)
    np.testing.assert_allclose(value, [0.5 * 0.85**2, 0.5 * 0.9**2], rtol=1e-6)
    assert clipped.tolist() == [True, False]


def test_token_weights_sum_to_the_rows_or_a_constant():
    mask = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(token_weights(mask, "token", 4)[0], [0.5, 0.5, 0.5, 0])
    np.testing.assert_allclose(token_weights(mask, "sequence", 4), [[1 / 3] * 3 + [0], [1, 0, 0, 0]])
    np.testing.assert_allclose(token_weights(mask, "constant", 4), mask / 4)


def models(value=True):
    scalar = small_model(head="scalar")
    return ActorCritic(small_model(init_std=0.3), scalar if value else None, None)


def minibatch(model, params, rows=4, length=12, top_p=0.8, seed=0):
    """Random rows whose behavior log-probabilities are near the policy's, with advantages, returns and values."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 64, (rows, length)).astype(np.int32)
    mask = np.zeros((rows, length), np.float32)
    for row, end in enumerate(random.integers(6, length + 1, rows)):
        mask[row, 3:end] = 1
    statistics = jax.jit(lambda p: model.token_statistics(p, tokens, temperature=0.9, top_p=top_p, with_entropy=True))
    found = statistics(params["policy"])
    noise = random.standard_normal((5, rows, length)).astype(np.float32)
    nucleus = np.where(np.isfinite(found.nucleus_log_probs), found.nucleus_log_probs, -1.0)
    batch = {
        "tokens": tokens,
        "weights": token_weights(mask, "token", length),
        "behavior_log_probs": (nucleus + 0.2 * noise[0]) * mask,
        "advantages": noise[1] * mask,
        "returns": noise[2] * mask,
        "values": 0.3 * noise[3] * mask,
        "reference_log_probs": (np.asarray(found.log_probs) + 0.1 * noise[4]) * mask,
        "scores": np.asarray([0.1, 0.7, -0.4, 0.2], np.float32)[:rows],
        "first_epoch": np.ones(rows, np.float32),
        "pretraining_tokens": random.integers(0, 64, (rows, 3, length)).astype(np.int32),
        "pretraining_loss_weights": np.ones((rows, 3, length), np.float32),
    }
    return batch, mask, found


def initialized(model):
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    if "value" in params:
        params["value"]["score"] = params["value"]["score"] + 0.1
    return params


def numpy_log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_nucleus(logits, top_p):
    """Log-probabilities with minus infinity outside the nucleus, by sorting, in float64."""
    logits = np.asarray(logits, float)
    probabilities = np.exp(numpy_log_softmax(logits))
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, -1)
    inside = np.zeros(logits.shape, bool)
    np.put_along_axis(inside, order, np.cumsum(ranked, -1) - ranked < top_p, -1)
    return numpy_log_softmax(np.where(inside, logits, -1e9)) + np.where(inside, 0, -np.inf)


def test_the_objective_of_ppo_equals_an_independent_computation():
    """The sum over a minibatch, with tokens outside the nucleus left out, values clipped and pretraining beside."""
    model = models()
    params = initialized(model)
    batch, mask, _ = minibatch(model, params)
    config = PPOConfig(pretraining_coefficient=0.3, missing_end_penalty=1.0, value_coefficient=0.1)
    objective = config.objective(0.9, 0.8, 3)
    extra = objective.initial_extra()
    total, sums = jax.jit(lambda p: objective.loss(model, p, batch, None, extra))(params)

    logits = np.asarray(outputs(model.policy, params["policy"], batch["tokens"]), float) / 0.9
    target = batch["tokens"][:, 1:, None]
    nucleus = np.take_along_axis(numpy_nucleus(logits[:, :-1], 0.8), target, -1)[..., 0]
    weights, advantages = batch["weights"][:, 1:], batch["advantages"][:, 1:]
    inside = np.isfinite(nucleus) & (weights > 0)
    assert 0 < inside.sum() < (weights > 0).sum()
    ratio = np.exp(np.where(inside, nucleus - batch["behavior_log_probs"][:, 1:], 0))
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2)) * inside
    value = outputs(Qwen(model.value_config), params["value"], batch["tokens"], method="scalars")
    value, old, returns = np.asarray(value)[:, :-1], batch["values"][:, 1:], batch["returns"][:, 1:]
    kept = old + np.clip(value - old, -0.15, 0.15)
    value_loss = 0.5 * np.maximum((value - returns) ** 2, (kept - returns) ** 2)
    text = batch["pretraining_tokens"].reshape(12, 12)
    plain = numpy_log_softmax(np.asarray(outputs(model.policy, params["policy"], text), float)[:, :-1])
    nats = -np.take_along_axis(plain, text[:, 1:, None], -1).sum()
    expected = (weights * policy).sum() + 0.1 * (weights * value_loss).sum() + 0.3 * nats / (3 * 11)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(sums["weight"]) == 4 and float(sums["token_weight"]) == pytest.approx(4)
    metrics = objective.summarize(sums)
    assert float(metrics["outside_nucleus"]) == pytest.approx((weights * ~inside).sum() / 4)
    assert float(metrics["pretraining_loss"]) == pytest.approx(nats / (12 * 11), rel=1e-5)
    merged = objective.update_extra(extra, sums)
    assert float(merged["mean"]) == pytest.approx(0.15) and float(merged["count"]) == 4


def test_gradients_are_finite_where_tokens_left_the_nucleus():
    model = models(value=False)
    params = initialized(model)
    batch, mask, found = minibatch(model, params, top_p=0.3)
    outside = ~np.isfinite(found.nucleus_log_probs) & (mask > 0)
    assert outside.any()
    objective = GRPOConfig(0.0, 0.0).objective(0.9, 0.3, 0)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(model, {"policy": p}, batch, None)[0]))(params["policy"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_lies_outside_the_response_has_no_part_in_the_gradient():
    """However far the reference is there: an infinite exponential times a weight of 0 would be NaN."""
    model = models(value=False)
    params = initialized(model)
    batch, mask, _ = minibatch(model, params)
    objective = GRPOConfig(0.0, 0.0).objective(0.9, 0.8, 0)
    gradient_of = jax.jit(jax.grad(lambda p, rows: objective.loss(model, {"policy": p}, rows, None)[0]))
    far = batch | {"reference_log_probs": np.where(mask > 0, batch["reference_log_probs"], np.float32(200))}
    jax.tree.map(
        np.testing.assert_array_equal, gradient_of(params["policy"], far), gradient_of(params["policy"], batch)
    )


def test_a_minibatch_in_parts_has_the_same_loss():
    """Counts over the whole minibatch: parts with other numbers of tokens add up."""
    model = models()
    params = initialized(model)
    batch, _, _ = minibatch(model, params)
    objective = PPOConfig(0.3, 1.0).objective(0.9, 0.8, 3)
    extra = objective.initial_extra()
    loss = jax.jit(lambda rows: objective.loss(model, params, rows, None, extra)[0])
    whole = float(loss(batch))
    parts = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    assert sum(float(loss(part)) for part in parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (PPOConfig, dict(value_clip=0), "PPOConfig.value_clip must be a number and positive"),
        (PPOConfig, dict(kl_coefficient=-1), "PPOConfig.kl_coefficient must be a number and at least 0"),
        (PPOConfig, dict(kl_estimator="k5"), "one of k1, k2, k3, found 'k5'"),
        (GRPOConfig, dict(clip_high=-0.2), "GRPOConfig.clip_high must be a number and positive"),
        (GRPOConfig, dict(aggregation="mean"), "one of token, sequence, constant, found 'mean'"),
    ],
)
def test_settings_out_of_range_are_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**{"pretraining_coefficient": 0.0, "missing_end_penalty": 1.0, **values})
    with pytest.raises(TypeError, match="pretraining_coefficient"):
        config(missing_end_penalty=1.0)


def test_models_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="64 rows of vocabulary and the policy 72"):
        ActorCritic(small_model(vocab_size=72), small_model(head="scalar"), None)
    with pytest.raises(ValueError, match="reward model needs ModelConfig.head = 'scalar'"):
        ActorCritic(small_model(), None, small_model())
    with pytest.raises(ValueError, match="policy needs ModelConfig.head = 'tokens'"):
        ActorCritic(small_model(head="scalar"), None, None)


def test_a_new_run_has_policy_and_reference_alike_and_values_of_zero():
    model = models()
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, params["policy"], params["reference"])
    assert (np.asarray(model.values(params["value"], np.ones((1, 5), np.int32))) == 0).all()
