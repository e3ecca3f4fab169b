"""The pairwise objective: its loss against torch's, and rewards that depend on nothing but their conversation."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from qwen_jax.alignment.preferences import pair_rewards, pairwise_loss, pairwise_preference, response_ends
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh, use_mesh
from qwen_jax.training.batches import global_batch
from qwen_jax.training.optimizer import OptimizerConfig, learning_rates
from qwen_jax.training.state import initial_state
from qwen_jax.training.step import batch_shapes, compile_train_step, make_train_step
from tests.alignment.hand_made_pairs import PairExamples, random_pairs, rows_of
from tests.fakes import outputs_of_row, random_params, small_model

MODEL = Qwen(small_model(head="scalar", vocab_size=64))
rewards, loss_of = (jax.jit(function, static_argnums=0) for function in (pair_rewards, pairwise_loss))
ends = jax.jit(response_ends)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL.config, 0.02)


def rewards_alone(params, pairs):
    """The rewards of all sides of pairs, each conversation in a row of its own without filling."""
    found = []
    for prompt, response in (side for pair in pairs for side in pair):
        scalars = outputs_of_row(MODEL, params, [*prompt, *response], 20, method="scalars")
        found.append(float(scalars[-1]))
    return np.asarray(found).reshape(-1, 2)


def whole_pairs(found):
    """[pairs, 2] rewards in the order of rows and places."""
    whole = np.asarray(found.whole)
    return np.stack([np.asarray(found.chosen)[whole], np.asarray(found.rejected)[whole]], axis=1)


def test_a_reward_depends_on_its_conversation_alone(params):
    """Packed with others in any order, with more filling, in another row of another batch."""
    pairs = random_pairs(5)
    alone = rewards_alone(params, pairs)
    for rows, length in (
        ([pairs], 190),
        ([pairs[:2], pairs[2:3], [], pairs[3:]], 80),
        ([[pair] for pair in pairs], 40),
    ):
        found = whole_pairs(rewards(MODEL, params, rows_of(rows, length)))
        np.testing.assert_allclose(found, alone, atol=1e-5)
    backwards = whole_pairs(rewards(MODEL, params, rows_of([pairs[::-1]], 190)))
    np.testing.assert_allclose(backwards, alone[::-1], atol=1e-5)


def test_loss_and_gradients_equal_torchs(params):
    """-logsigmoid(chosen - rejected): the formula of trl's RewardTrainer and of OpenRLHF's PairWiseLoss."""
    torch = pytest.importorskip("torch", reason="compares with torch's logsigmoid and its gradients")
    chosen, rejected = np.float32([2.0, -1.0, 30.0, -30.0, 0.5]), np.float32([1.0, 3.0, -60.0, 60.0, 0.5])

    class Given:
        """A model whose scalars are given, so that its loss is a function of rewards."""

        def apply(self, variables, tokens, **options):
            return variables["params"]

    rows = rows_of([[[([5], [1]), ([6], [1])] for _ in range(5)]], 24)
    scalars = np.zeros((1, 24), np.float32)
    scalars[0, 1:20:4], scalars[0, 3:20:4] = chosen, rejected
    compute = jax.jit(jax.value_and_grad(lambda p: pairwise_loss(Given(), p, rows, None), has_aux=True))
    (loss, sums), gradient = compute(scalars)
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    expected = -torch.nn.functional.logsigmoid(c - r)
    expected.sum().backward()
    assert float(sums["weight"]) == 5 and float(sums["correct"]) == 2
    np.testing.assert_allclose(loss, expected.sum().item(), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 1:20:4], c.grad, atol=1e-7)
    np.testing.assert_allclose(gradient[0, 3:20:4], r.grad, atol=1e-7)
    assert np.count_nonzero(gradient) <= 10
    confidence = torch.sigmoid((c - r).abs()).sum().item()
    np.testing.assert_allclose(sums["confidence"], confidence, rtol=1e-6)


@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6)
)
@hypothesis.settings(max_examples=60)
def test_a_reward_is_read_at_the_last_weighted_token_of_each_segment(lengths):
    """Segments of (tokens before, weighted, after): whatever follows the response, and where there is none."""
    segments, weights, expected = [], [], []
    for segment, (before, weighted, after) in enumerate(lengths, start=1):
        if weighted:
            expected.append(len(segments) + before + weighted - 1)
        segments += [segment] * (before + weighted + after)
        weights += [0.0] * before + [1.0] * weighted + [0.0] * after
    row = np.zeros((2, 6 * 11 + 3), np.float32)  # one length for all, with at least 3 of filling
    row[:, : len(segments)] = weights, segments
    found = ends(row[:1], row[1:].astype(np.int32))
    assert np.flatnonzero(found[0]).tolist() == expected


def test_pairs_without_a_response_on_both_sides_are_counted_and_left_out(params):
    pairs = random_pairs(3)
    batch = rows_of([pairs], 120)
    whole = whole_pairs(rewards(MODEL, params, batch))
    batch["loss_weights"][batch["segment_ids"] == 4] = 0
    _, sums = loss_of(MODEL, params, batch, None)
    assert float(sums["weight"]) == 2 and float(sums["incomplete"]) == 1
    found = rewards(MODEL, params, batch)
    np.testing.assert_allclose(whole_pairs(found), whole[[0, 2]], atol=1e-6)
    # A row whose last pair has no rejected side.
    batch = rows_of([pairs], 120)
    last = batch["segment_ids"] == 6
    batch["segment_ids"][last], batch["loss_weights"][last] = 0, 0
    _, sums = loss_of(MODEL, params, batch, None)
    assert float(sums["weight"]) == 2 and float(sums["incomplete"]) == 1


def test_rewards_that_are_not_a_number_reach_the_loss(params):
    """A broken model must end the run: no NaN is masked away with the filling."""
    broken = params | {"score": np.full_like(params["score"], np.nan)}
    loss, sums = loss_of(MODEL, broken, rows_of([random_pairs(2)], 120), None)
    assert math.isnan(float(loss)) and math.isnan(float(sums["margin"])) and float(sums["correct"]) == 0
    # And an infinite number at a token where nothing is read stays out.
    rows = rows_of([random_pairs(1)], 40)

    class Infinite:
        def apply(self, variables, tokens, **options):
            return jnp.where(response_ends(rows["loss_weights"], rows["segment_ids"]), 1.0, jnp.inf)

    assert float(pairwise_loss(Infinite(), {}, rows, None)[0]) == pytest.approx(math.log(2))


def run_step(layout, accumulation=1):
    """(loss, metrics, gradients) of one step of 16 rows."""
    recorder = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params: (gradient, gradient)
    )
    mesh, examples = make_mesh(MeshConfig(*layout), jax.devices()[: math.prod(layout)]), PairExamples()
    state = initial_state(MODEL, recorder, mesh, seed=3)
    rates = learning_rates(OptimizerConfig(1e-2), 10)
    step = make_train_step(
        MODEL, recorder, pairwise_preference(), rates, examples.columns, seed=0, accumulation=accumulation
    )
    shapes = batch_shapes(mesh, 16, examples.columns, accumulation)
    state, metrics = compile_train_step(step, state, shapes, mesh)(state, global_batch(examples, 0, shapes))
    return {name: float(value) for name, value in metrics.items()}, state.opt_state


@pytest.fixture(scope="module")
def one_device():
    return run_step((1, 1, 1, 1))


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [((1, 1, 1, 1), 8), ((2, 1, 2, 2), 2), ((1, 8, 1, 1), 1), pytest.param((1, 1, 1, 8), 1, marks=pytest.mark.slow)],
)
def test_rows_with_different_numbers_of_pairs_give_the_mean_over_pairs_on_any_mesh(layout, accumulation, one_device):
    metrics, gradient = run_step(layout, accumulation)
    expected, wanted = one_device
    assert metrics["pairs"] == expected["pairs"] == sum(1 + (index % 3 > 0) for index in range(16))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for here, there in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(here, there, rtol=0, atol=2e-5 * max(float(jnp.abs(there).max()), 1e-3))


def test_rewards_are_the_same_on_a_mesh(params):
    examples = PairExamples()
    batch = examples.read(0, 8)
    expected = rewards(MODEL, params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    with use_mesh(mesh):
        found = jax.jit(lambda params, batch: pair_rewards(MODEL, params, batch))(
            params, global_batch(examples, 0, batch_shapes(mesh, 8, examples.columns))
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


def test_the_held_out_line_names_accuracy_confidence_and_what_is_left_out():
    objective = pairwise_preference()
    sums = {"loss": 5.0, "weight": 10.0, "correct": 8.0, "margin": 7.0, "confidence": 7.5, "incomplete": 2.0}
    metrics = objective.evaluate(sums | {"chosen": 3.0, "rejected": -4.0}, None)
    assert metrics["accuracy"] == 0.8 and metrics["margin"] == 0.7 and metrics["chosen_reward"] == 0.3
    text = objective.describe(metrics)
    assert "accuracy 80.00% of 10 pairs" in text and "confidence of 75.00%" in text and "2 without a response" in text
