"""Columns of any shape, models and objectives that are not text: the same result on every mesh and in every job."""

import json

import jax
import numpy as np
import pytest

from qwen_jax.batch_spec import Column, is_packed, row_length, token_columns
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.step import batch_shapes
from tests.fakes import ImageExamples
from tests.jobs import outputs_of_job, start_job

# In this process and in others: losses and parameters after four steps on the devices that there are.
PROGRAM = """
import sys
import jax
from jax.experimental import multihost_utils
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.batches import Prefetcher
from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
from qwen_jax.training.program import compile_run
from qwen_jax.training.state import initial_state
from qwen_jax.training.step import batch_shapes
from tests.fakes import ImageExamples, ImageModel, squared_error

def steps(mesh, accumulation=1):
    model, config, examples, objective = ImageModel(), OptimizerConfig(1e-2), ImageExamples(), squared_error(True)
    shape = {"batch_size": 16, "columns": examples.columns, "accumulation": accumulation}
    step = compile_run(model, objective, config, 10, mesh, **shape)
    state = initial_state(model, make_optimizer(config, 10), mesh, 0, (), objective.initial_extra)
    batches = Prefetcher(examples, batch_shapes(mesh, 16, examples.columns))
    batches.start({})
    rows = []
    for _ in range(4):
        state, metrics = step(state, batches.next())
        rows.append([float(metrics[name]) for name in ("loss", "absolute_error", "gradient_norm")])
    batches.close()
    whole = multihost_utils.process_allgather((state.params, state.extra), tiled=True)
    return rows, [leaf.ravel().tolist() for leaf in jax.tree.leaves(whole)]
"""
PROCESS = """
import json
address, process = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
rows, leaves = steps(make_mesh(MeshConfig(data=2)))
print(json.dumps([rows, leaves]))
"""


def steps(layout, accumulation=1):
    names = {}
    exec(PROGRAM, names)
    return names["steps"](make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))]), accumulation)


@pytest.fixture(scope="module")
def one_device():
    return steps((1, 1, 1))


def assert_same(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for here, there in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "accumulation"), [((1, 1, 1), 4), ((2, 4, 1), 1), ((2, 2, 2), 2), ((1, 2, 1, 4), 2)], ids=str
)
def test_images_and_labels_give_the_same_on_every_mesh_and_in_parts(layout, accumulation, one_device):
    assert one_device[0][-1][0] < one_device[0][0][0]
    assert_same(steps(layout, accumulation), one_device)


def test_images_and_labels_give_the_same_in_two_processes(one_device, plain_environment):
    for output in outputs_of_job(start_job(PROGRAM + PROCESS, plain_environment)):
        assert_same(json.loads(output.splitlines()[-1]), one_device)


def test_what_columns_say_of_their_rows():
    assert row_length(token_columns(12)) == 12 and row_length(ImageExamples.columns) == 8
    assert row_length(ImageExamples.columns[:2]) is None
    assert is_packed(token_columns(12, packed=True)) and not is_packed(token_columns(12))
    with pytest.raises(ValueError, match="column 'label' has 1 axes .* and 0 names"):
        Column("label", "int32", (3,), ())


def test_a_column_that_does_not_divide_over_the_mesh_is_refused_by_name():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    columns = (Column("scores", "float32", (5,), ("vocab",)),)
    with pytest.raises(ValueError, match="column 'scores' has 5 along 'vocab', which lies on 2 devices"):
        batch_shapes(mesh, 8, columns)
