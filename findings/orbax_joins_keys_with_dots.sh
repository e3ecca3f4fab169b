#!/usr/bin/env bash
# Orbax saves {"a.b": x, "a": {"b": y}} without a word and gives y back for both: x is lost.
#
# One expects: two leaves with two paths are two arrays on disk, or an error.
# What happens: Orbax (v1 API, and the one before it) names the array of a leaf by the keys of its path joined with dots, so both
#   leaves are written to the array "a.b", and both are read from it. The tree's own metadata keeps the paths apart,
#   so structure, shapes and a strict restore all look right. A key with a slash ("a/b") is safe.
# Who suffers: whoever keys a pytree by outside names, such as peft's "base_model.model.….lora_A.weight" beside a
#   nested tree, or by version strings ("reward.v2" beside {"reward": {"v2": …}}), and saves models side by side.
# qwen_jax: parameters have Linen names, which hold no dots, and are safe; `checkpoints/arrays.py` itself relies on
#   this joining (`_array_spec`, `StoredParams` turn "." into "/"), so a dotted key would be misread there, too.
#   Checkpoints of named trees (LoRA, PPO) must refuse keys with a dot before they save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'jax[cpu]==0.10.2' 'orbax-checkpoint==0.12.8' 'numpy==2.4.6'
JAX_PLATFORMS=cpu PYTHONWARNINGS=ignore "$work/venv/bin/python" - "$work" <<'PYTHON'
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import orbax.checkpoint.experimental.v1 as ocp

print(f"orbax-checkpoint {orbax.__version__}, jax {jax.__version__}")
work = pathlib.Path(sys.argv[1])


def round_trip(name, tree):
    """What comes back of a tree that is saved and restored with its own shapes, strictly."""
    ocp.save_checkpointables(work / name, {"params": tree})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        tree,
    )
    return jax.tree.map(lambda x: np.asarray(x).tolist(), ocp.load_checkpointables(work / name, {"params": abstract})["params"])


ones, twos = jnp.ones(2), 2 * jnp.ones(2)
dots = round_trip("dots", {"a.b": ones, "a": {"b": twos}})
slashes = round_trip("slashes", {"a/b": ones, "a": {"b": twos}})
print("saved a.b = 1 and a -> b = 2, restored:", dots)
print("saved a/b = 1 and a -> b = 2, restored:", slashes)
assert dots["a.b"] == dots["a"]["b"], "the two leaves are no longer one array"
assert slashes == {"a/b": [1.0, 1.0], "a": {"b": [2.0, 2.0]}}
print("as described: one of two leaves is lost, without an error or a warning")
PYTHON
