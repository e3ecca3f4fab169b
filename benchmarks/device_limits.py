"""What this machine can do at most: matrix products a second by type, and bytes a second from main memory.

    python benchmarks/device_limits.py              # half a minute on two cores

Prints what benchmarks/results/machines.json takes: the limits of the pictures in docs/performance.md. Products are of
two square matrices, by XLA and by torch where it is there; the highest rate of many short rounds counts, since other
work on the machine can only lower it. Memory is read by a dot product of a vector with itself, and copied, in one
thread a core, on arrays beyond what caches hold.
"""

import argparse
import concurrent.futures
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read by numpy; the threads are ours

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from workers import machine  # noqa: E402

from qwen_jax.command_line import run  # noqa: E402


def most(work: Callable[[], object], amount: float, rounds: int) -> float:
    """`amount` over the seconds of the fastest round, after one that is not counted."""
    work()
    fastest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - began)
    return amount / fastest


@jax.jit
def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)  # sums in float32, as the model asks for


def products(side: int, rounds: int) -> dict[str, dict[str, float]]:
    """Operations per second of a product of two [side, side] matrices: type -> program -> rate."""
    values = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    found: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        left, right = (jnp.asarray(one, dtype) for one in values)
        rates = {"xla": most(lambda a=left, b=right: _product(a, b).block_until_ready(), 2.0 * side**3, rounds)}
        try:
            import torch
        except ImportError:
            pass
        else:
            a, b = (torch.from_numpy(one).to(getattr(torch, dtype)) for one in values)
            rates["torch"] = most(lambda a=a, b=b: a @ b, 2.0 * side**3, rounds)
        found[dtype] = rates
    return found


def bandwidth(mebibytes: int, rounds: int) -> dict[str, float]:
    """Bytes per second of main memory, read alone, and read and written by a copy."""
    cores = os.cpu_count() or 1
    arrays = [np.ones(mebibytes * 2**18, np.float32) for _ in range(2 * cores)]
    size = arrays[0].nbytes
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        read = lambda: list(pool.map(lambda one: np.dot(one, one), arrays[:cores]))  # noqa: E731
        copy = lambda: list(pool.map(np.copyto, arrays[:cores], arrays[cores:]))  # noqa: E731
        return {"read": most(read, cores * size, rounds), "copy": most(copy, 2 * cores * size, rounds)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="rows and columns of the matrices (2048)")
    parser.add_argument("--mebibytes", type=int, default=512, help="of each array; two a core (512)")
    parser.add_argument("--rounds", type=int, default=30, help="of which the fastest counts (30)")
    arguments = parser.parse_args(argv)
    print(machine(), flush=True)
    found = {
        "operations_per_second": products(arguments.side, arguments.rounds),
        "bytes_per_second": bandwidth(arguments.mebibytes, arguments.rounds),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main)
