"""A step compiled for two slices of TPUs that are not here, all axes at once: what crosses between the slices."""

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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_between_slices_only_sharded_gradients_cross_once(root):
    environment = {
        **os.environ,
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Sums, once per step in spite of two accumulation steps, of each device's eighth of the gradients.
    assert {(kind, times) for kind, times, _ in found["between"]} == {("ALL_REDUCE", 1)}
    crossing, share = sum(size for _, _, size in found["between"]), found["parameters"] / 8
    assert share <= crossing <= 1.05 * share
    # Parameters are gathered over fsdp and sequence, keys and values over sequence: within a slice.
    assert set(found["gathers"]) <= {2, 4}
