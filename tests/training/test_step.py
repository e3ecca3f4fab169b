"""The train step: sharding and accumulation change nothing, nothing is held whole, dropout follows the step."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.batches import global_batch
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from qwen_jax.training.state import abstract_state, initial_state
from qwen_jax.training.step import batch_shapes, compile_train_step, make_train_step
from tests.fakes import FakeExamples, small_model

COLUMNS = token_columns(16)
OPTIMIZER = OptimizerConfig(1e-2, warmup_steps=2)
# (data, fsdp, tensor, sequence): each axis alone, and with each other.
LAYOUTS = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 4, 1), (1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 2, 2)]
# Every other way to lay 8 devices out over four axes that divides the model (4 heads) and the batch.
MORE_LAYOUTS = [
    layout
    for layout in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8))
    if math.prod(layout) == 8 and layout not in LAYOUTS
]


# "Optimizer state" that is the last gradient: Adam would blow the rounding of a vanishing gradient up to a full step.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(lambda g: -0.1 * g, gradient), gradient),
)


def run_steps(
    layout,
    steps=2,
    accumulation=1,
    model_changes=None,
    seed=0,
    batch_size=16,
    transform=RECORDER,
    packed=False,
):
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    model = Qwen(small_model(**(model_changes or {})))
    state = initial_state(model, transform, mesh, seed=3)
    step = make_train_step(
        model,
        transform,
        next_token_prediction(),
        learning_rates(OPTIMIZER, 10),
        (examples := FakeExamples(packed=packed)).columns,
        seed=seed,
        accumulation=accumulation,
    )
    shapes = batch_shapes(mesh, batch_size, examples.columns, accumulation)
    compiled = compile_train_step(step, state, shapes, mesh)
    losses = []
    for index in range(steps):
        batch = global_batch(examples, index * batch_size, shapes)
        state, metrics = compiled(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.asarray(losses), state


def assert_same_run(one, other):
    """Losses within 1e-5; gradients within 1e-5 of each parameter's largest (keys' biases have gradient 0: noise)."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other[1].opt_state))
    for here, there in zip(jax.tree.leaves(one[1].opt_state), jax.tree.leaves(other[1].opt_state), strict=True):
        scale = max(float(jnp.abs(there).max()), 1e-3 * largest)
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def one_device():
    return run_steps((1, 1, 1))


@pytest.fixture(scope="module")
def one_device_packed():
    return run_steps((1, 1, 1), packed=True)


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)], ids=str
)
def test_loss_and_gradients_do_not_depend_on_the_layout(layout, one_device_packed):
    """Packed rows: segments and positions that start anew in the midst of a device's part of a row."""
    assert_same_run(run_steps(layout, packed=True), one_device_packed)


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [
        ((1, 1, 1), 8),
        ((2, 2, 1, 2), 4),
        *(pytest.param((*layout,), 2, marks=pytest.mark.slow) for layout in ((1, 1, 1), *LAYOUTS)),
    ],
)
def test_accumulation_gives_the_update_of_the_whole_batch(layout, accumulation, one_device):
    """Rows carry different numbers of tokens with loss, so a mean of means would show."""
    assert_same_run(run_steps(layout, accumulation=accumulation), one_device)


def test_no_device_holds_a_whole_matrix_or_moment():
    _, state = run_steps((1, 2, 2, 2), steps=1, transform=make_optimizer(OPTIMIZER, 10))
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        name = jax.tree_util.keystr(path)
        if leaf.size > 1024:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name


def test_the_initial_state_is_made_sharded_and_is_the_same_on_every_mesh():
    model, transform = Qwen(small_model()), make_optimizer(OPTIMIZER, 10)
    states = []
    for layout in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
        state = initial_state(model, transform, mesh, seed=5)
        for leaf, planned in zip(
            jax.tree.leaves(state), jax.tree.leaves(abstract_state(model, transform, mesh)), strict=True
        ):
            assert leaf.sharding == planned.sharding and leaf.shape == planned.shape and leaf.dtype == planned.dtype
        states.append(state)
    for one, other in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_device_reads_only_its_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    examples = FakeExamples()
    batch = global_batch(examples, 32, batch_shapes(mesh, 16, COLUMNS))
    assert sorted(examples.reads) == [(32, 36), (36, 40), (40, 44), (44, 48)]
    np.testing.assert_array_equal(batch["tokens"], FakeExamples().read(32, 48)["tokens"])


def test_rows_past_the_end_carry_no_loss():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    batch = global_batch(FakeExamples(count=5, repeat=False), 0, batch_shapes(mesh, 8, COLUMNS))
    assert float(batch["loss_weights"][5:].sum()) == 0 and float(batch["loss_weights"][1:5].min()) == 1


def test_dropout_is_a_function_of_seed_and_step():
    dropout = {"embedding_dropout": 0.2, "attention_dropout": 0.2}
    one, again = (run_steps((1, 1, 1), model_changes=dropout)[0] for _ in range(2))
    other = run_steps((1, 1, 1), model_changes=dropout, seed=1)[0]
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_a_compiled_step_refuses_other_shapes_instead_of_compiling_again():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model, transform = Qwen(small_model()), make_optimizer(OPTIMIZER, 10)
    state = initial_state(model, transform, mesh, seed=3)
    step = make_train_step(model, transform, next_token_prediction(), learning_rates(OPTIMIZER, 10), COLUMNS, seed=0)
    compiled = compile_train_step(step, state, batch_shapes(mesh, 8, COLUMNS), mesh)
    with pytest.raises(TypeError):
        compiled(state, global_batch(FakeExamples(), 0, batch_shapes(mesh, 4, COLUMNS)))


def test_the_state_is_donated():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model, transform = Qwen(small_model()), make_optimizer(OPTIMIZER, 10)
    step = make_train_step(model, transform, next_token_prediction(), learning_rates(OPTIMIZER, 10), COLUMNS, seed=0)
    state = abstract_state(model, transform, mesh)
    compiled = compile_train_step(step, state, batch_shapes(mesh, 8, COLUMNS), mesh)
    memory = compiled.memory_analysis()
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= state_bytes


@pytest.mark.parametrize(
    ("mesh", "batch", "accumulation", "message"),
    [((2, 2, 2), 6, 1, "multiple of 4"), ((1, 1, 8), 6, 4, "multiple of 4"), ((8, 1, 1), 12, 1, "multiple of 8")],
)
def test_a_batch_that_does_not_divide_is_refused(mesh, batch, accumulation, message):
    with pytest.raises(ValueError, match=message):
        batch_shapes(make_mesh(MeshConfig(*mesh)), batch, COLUMNS, accumulation)


def test_rows_that_do_not_divide_over_the_sequence_axis_are_refused():
    with pytest.raises(ValueError, match="sequence=8.*SEQUENCE_LENGTH"):
        batch_shapes(make_mesh(MeshConfig(fsdp=1, sequence=8)), 8, token_columns(20))


def test_a_mesh_that_does_not_divide_devices_or_model_is_refused():
    with pytest.raises(ValueError, match="8 device"):
        make_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(ValueError, match="heads"):
        abstract_state(Qwen(small_model()), make_optimizer(OPTIMIZER, 10), make_mesh(MeshConfig(1, 1, 8)))


def test_ids_outside_the_vocabulary_are_loud():
    model = Qwen(small_model())
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert bool(jnp.isnan(jax.jit(model.apply)(params, jnp.asarray([[1, 64]], jnp.int32))).any())
