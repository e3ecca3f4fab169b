#!/usr/bin/env bash
# On CPU, XLA makes a float32 copy of both factors of a batched product of bfloat16; of a product without batch it does not.
#
# One expects: half the bytes, half the time, as for a matrix product of a weight: both ask for float32 results.
# What happens: a dot_general with batch dimensions is computed in float32, and each factor is converted as a whole before
#   it, into memory of its own: twice the bytes of the factor, at each call. A plain matrix product reads bfloat16 as it is.
# Who suffers: decoding with a cache of keys and values in bfloat16. The cache is the larger factor, so each generated token
#   writes and reads a float32 copy of all of it: with 32 rows of 256 slots, a step took twice the CPU time of float32's.
# qwen_jax: `models.attention.cache_dtype` keeps the cache of bfloat16 models in float32 on CPUs: the same values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax[cpu]==0.10.2' 'numpy==2.4.6'
cat > "$work/memory.py" <<'PYTHON'
"""Bytes of temporary memory of a product, over those of its larger factor in bfloat16."""

import math

import jax
import jax.numpy as jnp


def ratio(equation, small, large, dtype):
    shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in (small, large))
    product = jax.jit(lambda a, b: jnp.einsum(equation, a, b, preferred_element_type=jnp.float32))
    return product.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (2 * math.prod(large))


batched = ("bhld,bhmd->bhlm", (32, 8, 1, 64), (32, 8, 256, 64))
plain = ("bd,df->bf", (32, 512), (512, 4096))
print("jax", jax.__version__)
found = {}
for name, one in (("batched", batched), ("plain", plain)):
    for dtype in (jnp.bfloat16, jnp.float32):
        found[name, dtype.__name__] = ratio(*one, dtype)
        print(f"{name} product of {dtype.__name__}: temporary memory {found[name, dtype.__name__]:.2f} of the factor")
assert found["batched", "bfloat16"] >= 2 > 0.1 > found["batched", "float32"], "the batched product has changed"
assert found["plain", "bfloat16"] < 0.1 and found["plain", "float32"] < 0.1, "the plain product has changed"
print("as described: only the batched product of bfloat16 copies its factors")
PYTHON
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/memory.py"
