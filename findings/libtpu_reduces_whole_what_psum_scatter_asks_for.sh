#!/usr/bin/env bash
# libtpu compiles psum_scatter over a torus to an all-reduce of the whole array and a slice, unless told otherwise.
#
# One expects: `jax.lax.psum_scatter`, and the gradient of a weight that is sharded over the batch's axis (FSDP, ZeRO-3),
#   to be a reduce-scatter: every chip sends and receives (n - 1) / n of the array once.
# What happens: over an axis that spans two or three dimensions of a slice (v5p of 16 chips, v5e of 16), the compiled program
#   has an all-reduce of the whole array, and then cuts out the shard: twice the bytes on the wire, and memory for all of it.
#   On v5p, reduce-scatters of several dimensions on the SparseCores, which are off by default, have to be asked for.
# Who suffers: training with sharded parameters on TPU pods. The reductions of gradients take twice their least, which a
#   count of collectives in the traced program (a reduce-scatter there) does not show.
# qwen_jax: gin/hardware/options/sparse_core_collectives.gin sets the options; a slow test counts the bytes of the compiled program.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax[cpu]==0.10.2' 'numpy==2.4.6' 'libtpu==0.0.42'
cat > "$work/scatter.py" <<'PYTHON'
"""Collectives of compiled programs that reduce an array of 8,192 by 4,096 to its shards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHAPE = (8192, 4096)
OPTIONS = {
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": True,
    "xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer": False,
}


def collectives(topology, options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("fsdp",))

    def scatter(x):
        return jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=0, tiled=True)

    placed = NamedSharding(mesh, P("fsdp"))
    x = jax.ShapeDtypeStruct((len(devices), *SHAPE), jnp.bfloat16, sharding=placed)
    traced = jax.jit(jax.shard_map(scatter, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))).lower(x)
    assert "reduce_scatter" in traced.as_text() and "all_reduce" not in traced.as_text()
    text = traced.compile(compiler_options=options).as_text()
    shapes = [[int(side) for side in found.split(",")] for found in re.findall(r"= bf16\[([\d,]+)\]\S* all-reduce\(", text)]
    return {"all-reduces": shapes, "reduce-scatters": len(re.findall(r" reduce-scatter(?:-start)?\(|%reduce-scatter", text)) > 0}


print("jax", jax.__version__)
found = {}
for topology in ("v5p:2x2x4", "v5e:4x4"):
    found[topology] = collectives(topology, {})
    print(topology, "by default:", found[topology])
found["with options"] = collectives("v5p:2x2x4", OPTIONS)
print("v5p:2x2x4 with the options:", found["with options"])
for topology in ("v5p:2x2x4", "v5e:4x4"):
    (shape,) = found[topology]["all-reduces"]
    assert shape[0] >= SHAPE[0] and not found[topology]["reduce-scatters"], "by default it is a reduce-scatter now"
assert found["with options"] == {"all-reduces": [], "reduce-scatters": True}, "the options have changed"
print("as described: an all-reduce of the whole array by default, a reduce-scatter with the options")
PYTHON
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/scatter.py" 2>"$work/errors" || { tail -3 "$work/errors"; exit 1; }
