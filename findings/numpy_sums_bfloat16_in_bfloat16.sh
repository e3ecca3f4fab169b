#!/usr/bin/env bash
# numpy adds up bfloat16 (ml_dtypes) arrays in bfloat16, one after the other: the sum of 4,096 ones is 256, their mean
# 0.0625, without a warning. For float16 numpy gives 4096 and 1 (pairwise sums, a float32 accumulator for the mean).
#
# One expects: what float16 does (sum 4096, mean 1.0), or what jnp.sum does with the same array.
# What happens: 256 + 1 rounds to 256 in bfloat16, so a sum of equal terms stops growing after 256 of them. It holds for
#   sum, mean, cumsum, np.add.reduce and along any axis; the mean of a vector of ones depends on its length.
# Who suffers: checks of converted weights or of logits by mean, norm or checksum on the host; mean pooling and
#   rewards averaged with numpy; metrics of a bfloat16 array fetched from a device.
# qwen_jax: conversion compares element by element, `conversion/checksums.py` hashes bytes, and log-probabilities leave
#   the device as float32 (`inference/engine.py`), so nothing is summed so. New code must say `.sum(dtype=np.float32)`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'numpy==2.4.6' 'ml_dtypes==0.6.0'
"$work/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np

print(f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}")


def reductions(dtype, length=4096):
    ones = np.ones(length, dtype)
    return {
        "sum": float(ones.sum()),
        "mean": float(ones.mean()),
        "cumsum": float(ones.cumsum()[-1]),
        "sum of columns": float(np.ones((length, 2), dtype).sum(0)[0]),
    }


bfloat16, float16 = reductions(ml_dtypes.bfloat16), reductions(np.float16)
print("4,096 ones, bfloat16:", bfloat16)
print("4,096 ones, float16: ", float16)
longer = float(np.ones(65536, ml_dtypes.bfloat16).mean())
wide = float(np.ones(4096, ml_dtypes.bfloat16).sum(dtype=np.float32))
print(f"mean of 65,536 ones in bfloat16: {longer}; sum of 4,096 with dtype=np.float32: {wide}")
assert bfloat16 == {"sum": 256, "mean": 0.0625, "cumsum": 256, "sum of columns": 256}, "bfloat16 is summed otherwise now"
assert float16["sum"] == 4096 and float16["mean"] == 1 and wide == 4096
assert longer == 256 / 65536
print("as described: a sum of bfloat16 stops at 256")
PYTHON
