"""The files of a checkpoint that a process needs: of an array in chunks, those that overlap with its own shards.

Where several processes write a checkpoint, Orbax lays each array down as Zarr 3, with one file for each chunk:

    TREE/KEYS.JOINED.BY.DOTS/zarr.json     shape and chunks
    TREE/KEYS.JOINED.BY.DOTS/c/I/J         chunk [I, J]; `c` alone of a scalar

A single process writes all arrays into a few files of OCDBT, of which everything is needed. A chunk that Orbax wants
and does not find is an error, so a file that is missing here can never become zeros of a parameter.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence

import jax

_ARRAY_FILE = "zarr.json"
_CHUNK = re.compile(r"(?P<array>.+)/c(?P<index>(?:/\d+)*)")


def is_array_file(name: str) -> bool:
    """Whether a file describes an array in chunks: `needed_files` reads it."""
    return name.endswith(f"/{_ARRAY_FILE}")


def needed_files(names: Iterable[str], read: Callable[[str], str], abstract: dict) -> list[str]:
    """Names of the files that this process has to read, in their order; `zarr.json` of all arrays are among them.

    Args:
      names: all files of the checkpoint, relative to its folder.
      read: gives the text of one of them.
      abstract: name to pytree of shapes, dtypes and shardings that are to be restored. An array that it lacks, has in
        another shape or without sharding is needed as a whole.
    """
    names = list(names)
    wanted = {
        f"{tree}/{'.'.join(map(_name, path))}": leaf
        for tree, leaves in abstract.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }
    chunks: dict[str, set[tuple[int, ...]] | None] = {}
    for array in (name.removesuffix(f"/{_ARRAY_FILE}") for name in names if is_array_file(name)):
        leaf = wanted.get(array)
        chunks[array] = None if leaf is None else _chunks_of(leaf, json.loads(read(f"{array}/{_ARRAY_FILE}")))

    def is_needed(name: str) -> bool:
        found = _CHUNK.fullmatch(name)
        needed = None if found is None else chunks.get(found["array"])
        if found is None or needed is None:
            return True
        return tuple(map(int, found["index"].split("/")[1:])) in needed

    return [name for name in names if is_needed(name)]


def _name(key) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _chunks_of(leaf, stored: dict) -> set[tuple[int, ...]] | None:
    """Indices of the chunks that the devices of this process need; None: all, or it is not known which."""
    shape, sharding = tuple(stored["shape"]), getattr(leaf, "sharding", None)
    if sharding is None or tuple(leaf.shape) != shape or stored["chunk_grid"]["name"] != "regular":
        return None
    chunk_shape = stored["chunk_grid"]["configuration"]["chunk_shape"]
    return overlapping_chunks(shape, chunk_shape, sharding.addressable_devices_indices_map(shape).values())


def overlapping_chunks(
    shape: Sequence[int], chunk_shape: Sequence[int], regions: Iterable[tuple[slice, ...]]
) -> set[tuple[int, ...]]:
    """Indices of the chunks of an array that overlap with one of `regions`, each a slice for every axis."""
    found: set[tuple[int, ...]] = set()
    spans = {tuple(one.indices(size)[:2] for one, size in zip(region, shape, strict=True)) for region in regions}
    for span in spans:
        if all(start < stop for start, stop in span):
            axes = zip(span, chunk_shape, strict=True)
            found.update(itertools.product(*(range(a // size, (b - 1) // size + 1) for (a, b), size in axes)))
    return found
