"""Memory of a run: its largest arrays, and errors that name the largest buffers."""

import contextlib
import logging
import re
from collections.abc import Generator
from pathlib import Path

import jax

from qwen_jax import files
from qwen_jax.checkpoints.errors import is_out_of_memory

log = logging.getLogger(__name__)

MEMORY_PROFILE = "memory.prof"
_NEED = (
    re.compile(r"\([^()]+\) exceeds available \w+ \([^()]+\)"),  # libtpu: "(61.02G) exceeds available HBM (15.75G)"
    re.compile(r"Used \S+ of \S+ \w+"),  # older ones: "Used 22.31G of 15.75G hbm"
    re.compile(r"allocate [\d.]+ ?\w+"),  # GPU allocators: "trying to allocate 17179869184 bytes", "… 16.00GiB"
)
_BUFFER_NAME = re.compile(r'op_name="([^"]+)"')
_BUFFER_SHAPE = re.compile(r"(?:Shape|Subshape): (\S+)")


class OutOfMemory(ValueError):
    """The program needs more memory than the device has; names the largest buffers."""


def largest_arrays(tree, count: int = 3) -> list[tuple[str, int]]:
    """(name and shape, bytes on one device) of the largest arrays of a pytree of arrays or ShapeDtypeStructs."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        size = leaf.dtype.itemsize
        for length in shape:
            size *= length
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        rows.append((f"{name} {leaf.dtype}{list(shape)}", size))
    return sorted(rows, key=lambda row: -row[1])[:count]


def format_bytes(size: int) -> str:
    """The size in GiB, or in MiB below an eighth of a GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


@contextlib.contextmanager
def explain_out_of_memory(doing: str, folder: Path, state) -> Generator[None]:
    """Turns an out-of-memory error into one that names the largest buffers, and writes a memory profile.

    Args:
      doing: the activity that needed the memory, for the error.
      folder: gets `memory.prof`, which `pprof` reads.
      state: pytree of arrays or shapes; the error names the largest of them.

    Raises:
      OutOfMemory: in place of JAX's RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_explanation(str(error), doing, folder, state)) from error


def _listed_buffers(message: str) -> list[str]:
    """Name and size of the buffers that an error of XLA lists, in its order (TPU and GPU differ in little)."""
    found = []
    for entry in message.split("Size: ")[1:]:
        entry = entry.partition("====")[0]
        name, shape = _BUFFER_NAME.search(entry), _BUFFER_SHAPE.search(entry)
        found.append(" ".join([*(match[1] for match in (name, shape) if match), entry.split()[0]]))
    return found


def _explanation(message: str, doing: str, folder: Path, state) -> str:
    match = next((found for pattern in _NEED if (found := pattern.search(message))), None)
    amount = "" if match is None else f" ({match[0]})"
    # Compilers and allocators mostly list buffers, largest first; where they do not, the arrays of the state are known.
    named = _listed_buffers(message)[:3] or [f"{name} {format_bytes(size)}" for name, size in largest_arrays(state)]
    profile = folder / MEMORY_PROFILE
    try:
        with files.new_file(profile) as temporary:
            jax.profiler.save_device_memory_profile(temporary)
        written = f"; a profile of the memory is in {profile} (read it with pprof)"
    except (OSError, jax.errors.JaxRuntimeError) as failed:
        written = f"; no profile of the memory could be written ({failed})"
    return (
        f"out of memory while {doing}{amount}. Largest buffers of a device: {'; '.join(named)}{written}. Use more "
        f"devices along MeshConfig.fsdp or .tensor, a higher ACCUMULATION_STEPS, or a remat policy that keeps less"
    )
