#!/usr/bin/env bash
# flax.linen: under nn.scan a parameter starts from other random numbers when its module declares a further parameter after
# it. Without the scan it does not.
#
# One expects: the start of a parameter depends on the key, its path and what is declared before it, scanned or not.
# What happens: nn.scan traces the body of the layer more than once and the module's counter of keys goes on from one
#   trace to the next, so the key of the first parameter counts the parameters that follow it.
# Who suffers: anyone who adds a bias, a norm or an adapter to a scanned layer and compares with a run of before by the same
#   seed: all of the module's parameters start anew, and the two runs differ for a reason that is not the change.
# qwen_jax: LoRA's parameters stand beside the kernel in a scanned projection, so a model with adapters starts from other
#   random kernels than one without, at the same seed. Runs with LoRA take their kernels from a checkpoint.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax==0.10.2' 'flax==0.12.8'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

print("flax", flax.__version__, "jax", jax.__version__)


def kernel(scanned: bool, further: bool):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + self.param("kernel", nn.initializers.normal(1.0), (2,))
            if further:
                self.param("later", nn.initializers.zeros, (2,))
            return x, None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = Layer
            if scanned:
                layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=1)
            return layer(name="layer")(x, None)[0]

    return np.ravel(Net().init(jax.random.key(0), jnp.zeros(2))["params"]["layer"]["kernel"])


for scanned in (False, True):
    print("scanned" if scanned else "plain", "alone:", kernel(scanned, False), "with a later one:", kernel(scanned, True))
assert (kernel(False, False) == kernel(False, True)).all(), "the plain module now differs, too"
assert (kernel(True, False) != kernel(True, True)).any(), "the scanned module no longer differs"
print("as described: a later parameter changes an earlier one under nn.scan")
PYTHON
