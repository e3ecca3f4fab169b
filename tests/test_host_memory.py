"""Page faults of programs for CPUs, with and without `keep_freed_memory`."""

import os
import subprocess
import sys

import pytest

from qwen_jax.host_memory import keep_freed_memory

# Each call of the program needs seven arrays of 9 MB at once: 16,128 pages.
COUNT_FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from qwen_jax.host_memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)


@jax.jit
def program(x):
    products = [jnp.outer(x, x)]
    for _ in range(6):
        products.append(products[-1] @ products[0])
    return sum((product * products[-1]).sum() for product in products)


x = jnp.linspace(0.0, 1e-3, 1536)
counts = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[len(counts) // 2])
"""


def faults(mode: str) -> int:
    # Without the flags of the other tests: several virtual devices allocate in threads of their own.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc, or JAX has an accelerator")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_program_that_runs_again_finds_its_memory():
    # In about one process of five the heap cannot grow where it lies, and glibc maps new memory after all.
    assert any(faults("keep") < 1000 for _ in range(6))
    assert faults("leave") > 1000


def test_accelerators_keep_the_defaults(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ["a plugin"])
    assert not keep_freed_memory()
