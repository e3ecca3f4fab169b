"""Programs compiled for two slices of TPUs that are not here: what crosses between the slices, and within one."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest

# In another process: a process with libtpu's flags is no place for other tests.
PROGRAM = """
import json, math, re
from jax.experimental import topologies
from qwen_jax.batch_spec import token_columns
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.build import parameter_count
from qwen_jax.models.transformer import Qwen
from qwen_jax.programs.account import account
from qwen_jax.programs.hlo import Program, array_shapes, group_size
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.program import compile_run

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
model = ModelConfig(
    vocab_size=2048, hidden_size=512, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=1024,
    attention_kernel="splash",
)
program = compile_run(
    Qwen(model), next_token_prediction(), OptimizerConfig(1e-3), 10,
    make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, sequence=2), devices), batch_size=8,
    columns=token_columns(512, packed=True), accumulation=2,
)
hlo = Program(program.as_text())
between, groups = [], set()
for name, times in account(hlo).times.items():
    for instruction in hlo.computations[name].instructions:
        if instruction.op == "send":
            kind = re.search('_xla_megascale_transfer_type="(\\\\w+)"', instruction.attributes)[1]
            between.append((kind, times, math.prod(array_shapes(instruction.shape)[0][1])))
        elif instruction.op.startswith("all-gather"):
            groups.add(group_size(instruction, hlo.partitions))
print(json.dumps({"parameters": parameter_count(model), "between": between, "gathers": sorted(groups)}))
"""

GRADIENTS = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from qwen_jax.models.ops import embed, gather_weight, project
from qwen_jax.programs.account import collectives_per_device
from qwen_jax.sharding import MeshConfig, make_mesh, spec, sum_over_replicas, use_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4", num_slices=2).devices
mesh = make_mesh(MeshConfig(data=2), devices)
WIDTH, WIDE, ROWS = 2048, 2816, 4736  # rows: 128 times a prime number

def gradients(params, batch, _):
    def loss(params):
        table = gather_weight(params["table"], ("vocab", "embed"), jnp.bfloat16)
        kernel = gather_weight(params["kernel"], ("embed", "mlp"), jnp.bfloat16)
        y = project("bld,df->blf", embed(table, batch["tokens"]), kernel)
        return (y.astype(jnp.float32) ** 2).sum()
    return jax.grad(loss)(params)

placed = lambda *names: NamedSharding(mesh, spec(names))
shaped = lambda shape, dtype, *names: jax.ShapeDtypeStruct(shape, dtype, sharding=placed(*names))
with use_mesh(mesh):
    params = {
        "table": shaped((ROWS, WIDTH), jnp.float32, "vocab", "embed"),
        "kernel": shaped((WIDTH, WIDE), jnp.float32, "embed", "mlp"),
    }
    batch = {"tokens": shaped((64, 256), jnp.int32, "batch", "length")}
    summed = jax.jit(
        lambda p, b: sum_over_replicas(gradients, {"tokens": ("length",)})(p, b, None),
        out_shardings={name: leaf.sharding for name, leaf in params.items()},
    ).lower(params, batch)
found = collectives_per_device(summed.compile(compiler_options=json.loads(sys.argv[1])).as_text())
print(json.dumps({kind: total.wire_bytes for kind, total in found.items()}))
"""


@pytest.fixture
def compile_program(root):
    """Runs a program that prints JSON, in a process that may load libtpu."""

    def compiled(program, *arguments):
        environment = {
            **os.environ,
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        }
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return compiled


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_gradients_are_scattered_within_a_slice_and_move_no_more_than_they_must(root, compile_program):
    """On the wire at most 1.1 of a gather and a reduce-scatter of each weight: an all-reduce of one would be 1.25."""
    options = (root / "gin/hardware/options/sparse_core_collectives.gin").read_text().split("compiler_options = ")[1]
    options = ast.literal_eval(options.replace("%SCOPED_VECTOR_MEMORY_KIB", "32768"))
    wire = compile_program(GRADIENTS, json.dumps(options))
    weights = 2 * 2048 * (4736 + 2816) * 15 / 16
    # One gather of each for both passes at least, of the kernel perhaps one for either.
    assert wire["reduce-scatter"] <= 1.05 * weights
    assert sum(wire.values()) <= 1.1 * (2 * weights + 2 * 2048 * 2816 * 15 / 16)
    assert wire.get("all-reduce", 0) < 0.01 * weights


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_between_slices_only_sharded_gradients_cross_once(compile_program):
    found = compile_program(PROGRAM)
    # Sums, once per step in spite of two accumulation steps, of each device's eighth of the gradients.
    assert {(kind, times) for kind, times, _ in found["between"]} == {("ALL_REDUCE", 1)}
    crossing, share = sum(size for _, _, size in found["between"]), found["parameters"] / 8
    assert share <= crossing <= 1.05 * share
    # Parameters are gathered over fsdp and sequence, keys and values over sequence: within a slice.
    assert set(found["gathers"]) <= {2, 4}
