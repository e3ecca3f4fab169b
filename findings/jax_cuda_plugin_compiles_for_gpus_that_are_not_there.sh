#!/usr/bin/env bash
# JAX's plugin for CUDA compiles for GPUs that are not there, if it is told what they are; nothing says so, and by default it fails.
#
# One expects: to compile a program for a GPU takes a machine with one, for a description of absent devices
#   (`jax.experimental.topologies.get_topology_desc`) is known of TPUs alone; asked for "cuda" without more, the plugin indeed
#   answers that it cannot make a topology "without an explicit topology shape or without a client".
# What happens: with two options that no documentation of JAX names, `topology="1xMACHINESxGPUS"` and `target_config`, the text of XLA's
#   GpuTargetConfigProto, the wheels alone (no driver, no CUDA toolkit, no other NVIDIA package) compile a sharded program to the end, with
#   its collectives and the memory that a GPU needs for it.
# Who suffers: whoever rents eight GPUs to learn that a model does not fit.
# qwen_jax: tools/compile_for_gpu.py does it for every stage of training; figures of GPUs are in gin/hardware/options/h200.gin.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax[cpu]==0.10.2' 'numpy==2.4.6'
"$work/venv/bin/pip" install -q --no-compile --no-deps --disable-pip-version-check 2>/dev/null 'jax-cuda13-plugin==0.10.2' 'jax-cuda13-pjrt==0.10.2'
cat > "$work/compile.py" <<'PYTHON'
"""A product of rows of a and columns of b, each sharded over eight GPUs, compiled on a machine without one."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000 device_memory_size: 149250113536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "a GPU with the figures of an H200"
"""
ROWS = 8192

try:
    topologies.get_topology_desc("gpus", "cuda", target_config=TARGET)
    without = "described"
except jax.errors.JaxRuntimeError as error:
    without = str(error).splitlines()[0]
devices = topologies.get_topology_desc("gpus", "cuda", topology="1x1x8", target_config=TARGET).devices
mesh = Mesh(np.array(devices), ("x",))
a, b = (
    jax.ShapeDtypeStruct((ROWS, ROWS), jnp.bfloat16, sharding=NamedSharding(mesh, place)) for place in (P("x"), P(None, "x"))
)
multiply = jax.jit(lambda a, b: a @ b, out_shardings=NamedSharding(mesh, P("x")))
compiled = multiply.lower(a, b).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
print("jax", jax.__version__, "devices here:", jax.devices())
print("without a shape:", without)
print("with one:", len(devices), devices[0].device_kind, devices[0].platform)
print("arguments", memory.argument_size_in_bytes, "bytes a GPU, gathers:", text.count("all-gather-start("))
assert "explicit topology shape" in without
assert len(devices) == 8 and devices[0].platform == "gpu" and all(device.platform == "cpu" for device in jax.devices())
assert memory.argument_size_in_bytes == 2 * 2 * ROWS * ROWS // 8
assert "all-gather-start(" in text and memory.temp_size_in_bytes >= 2 * ROWS * ROWS
PYTHON
"$work/venv/bin/python" "$work/compile.py" 2>/dev/null
echo "as described"
