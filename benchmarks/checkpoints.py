"""Saving and restoring a training state on disk, against plain Orbax: how long a step waits, and what is written.

    python benchmarks/checkpoints.py --folder=runs/checkpoints      # 6.5 GB of state, and twice that of memory
    python benchmarks/checkpoints.py --folder=runs/checkpoints --layers=2 --vocab_size=8192 --rounds=1

The state is that of the 1.8B model in training, parameters and both moments of Adam in float32, with layers of its
shape; their number and the rows of the vocabulary are cut so that the state and its copy while it is saved fit into
memory. The peer is `ocp.CheckpointManager` with its default options, `StandardSave` and `StandardRestore` of the same
arrays. A round of both goes before those that count, in which imports are made and the process takes its memory.

Both take turns in one process, on a disk that has finished writing. For each: seconds that the call of a save holds a
step up; how much longer the steps take that follow while the files are written; seconds from opening the folder to the
end of the first step after a restore, with the files out of the kernel's cache where it can be asked for that; bytes
written. Restored arrays are compared with what was saved, bit for bit.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from loader import forget  # noqa: E402
from train_step import preset  # noqa: E402
from workers import machine  # noqa: E402

from qwen_jax.checkpoints.manager import Checkpoints  # noqa: E402
from qwen_jax.command_line import path_argument, run  # noqa: E402
from qwen_jax.host_memory import keep_freed_memory  # noqa: E402
from qwen_jax.models.build import build_model  # noqa: E402
from qwen_jax.models.transformer import abstract_params  # noqa: E402

METADATA = {"positions": {"train": 0}, "fingerprints": {}, "skipped_examples": {}}


def make_state(layers: int, vocab_size: int) -> dict:
    """{"params", "optimizer": {"mu", "nu"}} with random values of the sizes that training has, float32."""
    config = dataclasses.replace(preset("1.8b", 2048), num_layers=layers, vocab_size=vocab_size)
    shapes = nn.meta.unbox(abstract_params(build_model(config)))
    leaves, structure = jax.tree.flatten(shapes)

    def tree(seed: int, scale: float, power: int) -> dict:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        values = [(scale * jax.random.normal(key, leaf.shape)) ** power for key, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, values)

    return {"params": tree(0, 0.02, 1), "optimizer": {"mu": tree(1, 1e-4, 1), "nu": tree(2, 1e-4, 2)}}


@jax.jit
def _checksum(state: dict) -> jax.Array:
    """A number that a changed bit changes, whichever it is."""
    sums = [
        jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32), dtype=jnp.uint32) for leaf in jax.tree.leaves(state)
    ]
    return jnp.stack(sums)


def _update(state: dict) -> dict:
    """A step as the memory sees it: reads and replaces every number, as Adam does."""
    mu = jax.tree.map(lambda m, p: 0.9 * m + 1e-6 * p, state["optimizer"]["mu"], state["params"])
    nu = jax.tree.map(lambda v, m: 0.95 * v + 0.05 * m * m, state["optimizer"]["nu"], mu)
    params = jax.tree.map(lambda p, m, v: p - 1e-4 * m / (jnp.sqrt(v) + 1e-8), state["params"], mu, nu)
    return {"params": params, "optimizer": {"mu": mu, "nu": nu}}


update = jax.jit(_update, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Saver:
    """One side. `open` gives an object with `close`; the others take it."""

    name: str
    open: Callable
    save: Callable
    wait: Callable
    restore: Callable


def _ours(path: Path) -> Saver:
    return Saver(
        "qwen_jax",
        open=lambda: Checkpoints(path),
        save=lambda manager, step, state: manager.save(step, state, METADATA),
        wait=lambda manager: manager.wait(),
        restore=lambda manager, abstract: manager.restore_latest(abstract)[1],
    )


def _plain_orbax(path: Path) -> Saver:
    return Saver(
        "orbax, defaults",
        open=lambda: ocp.CheckpointManager(path.absolute()),
        save=lambda manager, step, state: manager.save(step, args=ocp.args.StandardSave(state)),
        wait=lambda manager: manager.wait_until_finished(),
        restore=lambda manager, abstract: manager.restore(
            manager.latest_step(), args=ocp.args.StandardRestore(abstract)
        ),
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds and bytes of one round."""

    call: float
    slower: float
    written: float
    restore: float
    restore_cpu: float
    size: int


def step_seconds(state: dict) -> tuple[dict, float]:
    """(the next state, seconds of the step)."""
    began = time.perf_counter()
    state = jax.block_until_ready(update(state))
    return state, time.perf_counter() - began


def measure(saver: Saver, folder: Path, state: dict, usual: float) -> tuple[dict, Measured]:
    """One save with the steps that go on meanwhile, and one restore; gives the restored state after a step.

    Args:
      usual: seconds of a step while nothing is written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    manager = saver.open()
    saved = jax.device_get(_checksum(state))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(next(iter(leaf.devices())))
        ),
        state,
    )
    began = time.perf_counter()
    saver.save(manager, 1, state)
    call = time.perf_counter() - began
    slower = 0.0
    for _ in range(3):  # state is donated: what is written has to be a copy
        state, seconds = step_seconds(state)
        slower += seconds - usual
    saver.wait(manager)
    written = time.perf_counter() - began
    manager.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    del state
    os.sync()
    forget(folder)
    began, cpu = time.perf_counter(), time.process_time()
    manager = saver.open()
    state = jax.block_until_ready(saver.restore(manager, abstract))
    restored = time.perf_counter() - began
    if (jax.device_get(_checksum(state)) != saved).any():
        raise ValueError(f"{saver.name} restored other numbers than were saved")
    state, seconds = step_seconds(state)
    manager.close()
    shutil.rmtree(folder)
    return state, Measured(call, slower, written, restored + seconds, time.process_time() - cpu, size)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=path_argument, required=True, help="on the disk to measure; is emptied")
    parser.add_argument("--layers", type=int, default=8, help="of the model's 24 (8)")
    parser.add_argument("--vocab_size", type=int, default=32768, help="rows of the vocabulary's 151,936 (32,768)")
    parser.add_argument("--rounds", type=int, default=2, help="of which medians are printed (2)")
    arguments = parser.parse_args(argv)
    keep_freed_memory()  # as training does
    state = jax.block_until_ready(make_state(arguments.layers, arguments.vocab_size))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{machine()}; jax {jax.__version__}, orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}")
    print(f"{size / 1e9:.2f} GB of float32: {arguments.layers} layers, {arguments.vocab_size:,} rows of the vocabulary")
    sides = [_ours(arguments.folder / "qwen_jax"), _plain_orbax(arguments.folder / "orbax")]
    folders = [arguments.folder / "qwen_jax" / "checkpoints", arguments.folder / "orbax"]
    state, _ = step_seconds(state)  # compiles
    alone = []
    for _ in range(5):
        state, seconds = step_seconds(state)
        alone.append(seconds)
    usual = statistics.median(alone)
    rounds: list[list[Measured]] = [[], []]
    for number in range(arguments.rounds + 1):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            state, found = measure(sides[index], folders[index], state, usual)
            if number:  # in the first one the process takes its memory from the system
                rounds[index].append(found)
            print(f"round {number}, {sides[index].name}: {found}", file=sys.stderr, flush=True)
    columns = [field.name for field in dataclasses.fields(Measured)]
    medians = [{name: statistics.median(getattr(one, name) for one in side) for name in columns} for side in rounds]
    print(f"a step alone: {usual:.2f} s; medians of {arguments.rounds} round(s)\n")
    print(
        "| | call of a save, s | next 3 steps slower, s | until written, s | restore and first step, s | CPU s | GB |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for side, one in zip(sides, medians, strict=True):
        shown = " | ".join(f"{one[name]:.2f}" for name in columns[:-1])
        print(f"| {side.name} | {shown} | {one['size'] / 1e9:.2f} |")
    ratios = [ours / peer for ours, peer in zip(medians[0].values(), medians[1].values(), strict=True)]
    print(f"| ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    held = [one["call"] + max(0.0, one["slower"]) for one in medians]
    print(f"\nheld up in all (call and slower steps): {held[0]:.2f} against {held[1]:.2f} s: {held[0] / held[1]:.2f}")
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    run(main)
