#!/usr/bin/env bash
# On CPU, jax.device_put and jax.make_array_from_* may keep the numpy memory they are given: write to it, and the
# "immutable" jax.Array changes. Whether they do depends on the address that malloc happened to return.
#
# One expects: device_put copies, as it must on an accelerator; a batch buffer may be filled again once it returns.
# What happens: memory aligned to 64 bytes is shared, other memory is copied. Large arrays of numpy are always or
#   nearly always aligned by chance, small ones now and then, so tests on small arrays pass or fail by luck.
#   `device_put(x, may_alias=False)` shares all the same; jnp.array copies.
# Who suffers: loaders that fill one buffer (or a shared-memory ring of decoding workers) again and again, and tests
#   on CPU of code that is right on TPU and GPU: batches silently become later batches.
# qwen_jax: `training/batches.py` gives each batch arrays of its own (`data/loader.py` allocates at every read), so it
#   is safe now. A ring of decoded pictures shared between processes must hand over copies.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax[cpu]==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

print(f"jax {jax.__version__}, numpy {np.__version__}")
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())


def buffer(offset):
    """1,024 zeros (int32) that begin `offset` bytes after a multiple of 64."""
    raw = np.zeros(4096 + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + 4096].view(np.int32)


def changes(make, array):
    """Whether the jax.Array made of a numpy array changes when that is written to."""
    made = jax.block_until_ready(make(array))
    array[:] = 7
    return bool(made[0] == 7)


ways = {
    "device_put": jax.device_put,
    "device_put, may_alias=False": lambda x: jax.device_put(x, may_alias=False),
    "make_array_from_process_local_data": lambda x: jax.make_array_from_process_local_data(sharding, x),
    "make_array_from_callback": lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    "jnp.array": jnp.array,
}
found = {name: (changes(way, buffer(0)), changes(way, buffer(4))) for name, way in ways.items()}
for name, (aligned, unaligned) in found.items():
    print(f"{name}: changes with the buffer when it is aligned {aligned}, when it is not {unaligned}")
kept = [np.zeros(200, np.int32) for _ in range(200)]
print(f"np.zeros(200, int32): {sum(changes(jax.device_put, x) for x in kept)} of 200 change")
assert found.pop("jnp.array") == (False, False), "jnp.array shares memory now"
assert all(shared == (True, False) for shared in found.values()), "these no longer share aligned memory, or always do"
print("as described: the value of a jax.Array changed after it was made")
PYTHON
