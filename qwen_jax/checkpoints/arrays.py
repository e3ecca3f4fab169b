"""The weights of run folders without the optimizer: written as a run of their own, read as arrays or onto a mesh.

A checkpoint holds the trained parameters as `params` and the frozen ones, if there are any, as `frozen`; here they are
one tree. A run of several models (PPO) is read as its policy.

Orbax is imported where it is used, which is not in generation: importing it takes a third of a second.
"""

import collections
import contextlib
import logging
import math
import tempfile
import weakref
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding

from qwen_jax import files
from qwen_jax.checkpoints.errors import one_line, unreadable_reason
from qwen_jax.checkpoints.run_folder import (
    CHECKPOINTS,
    COMMIT_FILE,
    TOKENIZER_FILE,
    CheckpointError,
    checksums,
    read_config,
    saved_steps,
    write_run_files,
)
from qwen_jax.models.build import build_model
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import abstract_params

log = logging.getLogger(__name__)

PIECE_BYTES = 2**26
# Chunks of a piece. They are compressed and read side by side, and fit into the caches of a core.
CHUNKS_IN_PIECE = 8
# Bytes of arrays whose writing is under way.
WRITING_BYTES = 2**28
# Trees of a checkpoint that hold parameters.
PARAMETER_TREES = ("params", "frozen")
_PARAMETER_FOLDERS = tuple(f"{tree}/" for tree in PARAMETER_TREES)
# Sub-tree of a run of several models that the run folder stands for.
POLICY = "policy"


def tokenizer_path(path: files.PathLike) -> Path | None:
    """The .tiktoken file of a run folder (or of one step's folder in it), or None."""
    file = _run_folder(path)[0] / TOKENIZER_FILE
    return file if file.is_file() else None


@contextlib.contextmanager
def _appearing(folder: Path) -> Generator[Path]:
    """A hidden folder beside `folder`, which replaces it when the block ends well, and is removed otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: choose another output folder, or remove it")
    if folder.parent.is_dir():
        files.remove_unfinished(folder.parent, folder.name)
    with files.new_folder(folder) as temporary:
        yield temporary


def save_params(folder: str | Path, config: ModelConfig, params, tokenizer: str | Path | None) -> None:
    """Writes weights alone as a run folder with one checkpoint, at step 0.

    Args:
      folder: must not exist, or be empty. It appears whole or not at all.
      params: the parameter pytree, numpy or jax arrays.
      tokenizer: a .tiktoken file to copy, or None.

    Raises:
      CheckpointError: the folder is not empty.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    with _appearing(Path(folder)) as temporary:
        write_run_files(temporary, config, tokenizer)
        ocp.save_checkpointables(str((temporary / CHECKPOINTS / "0").absolute()), {"params": params})


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part of an array that is compressed as one: whole rows of the first axis, or of the second one of one row."""
    limit, row = PIECE_BYTES // CHUNKS_IN_PIECE // 4, math.prod(shape[1:])
    if row <= limit or len(shape) < 2:
        return min(shape[0], max(1, limit // max(1, row))), *shape[1:]
    parts = -(-row // limit)
    return 1, -(-shape[1] // min(parts, shape[1])), *shape[2:]


def pieces(shape: tuple[int, ...]) -> list[slice]:
    """Slices of the first axis that together cover an array, each of about `PIECE_BYTES` in float32, or one index.

    Each is a number of whole chunks.
    """
    rows = chunk_shape(shape)[0]
    step = rows * max(1, PIECE_BYTES // max(1, 4 * rows * math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _compression(dtype: np.dtype) -> dict:
    """Codec of zarr for chunks of parameters.

    Transposing the bits of numbers before LZ4 takes a seventh of the time of Zstandard's level 1, and writes no more of
    float32 that came from bfloat16 (90 million of them: 0.3 instead of 2.2 CPU seconds, and 0.4 instead of 0.7 to
    read).
    """
    settings = {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "typesize": dtype.itemsize, "blocksize": 0}
    return {"name": "blosc", "configuration": settings}


class _Blocks:
    """Memory for pieces, used again: the system fills what it hands out with zeros, which takes as long as a copy."""

    def __init__(self):
        self._free: list[np.ndarray] = []  # a list's own methods may be called by several threads
        self._lent: dict[int, np.ndarray] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if not PIECE_BYTES // 4 <= size <= PIECE_BYTES:  # too small for a block, or one index of the first axis
            return np.empty(shape, dtype)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(PIECE_BYTES, np.uint8)
        array = block[:size].view(dtype).reshape(shape)
        self._lent[id(array)] = block
        return array

    def give_back(self, array: np.ndarray) -> None:
        """Of an array that `take` gave, and that nobody reads any more."""
        if (block := self._lent.pop(id(array), None)) is not None:
            self._free.append(block)


class ParamsWriter:
    """Writes parameters into a run folder piece by piece; made by `writing_params`."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        import orbax.checkpoint.experimental.v1 as ocp

        # Orbax itself lays down all files but the arrays' data: it saves a tree of the same names with one number each.
        skeleton = unflatten_dict({path: np.zeros(1, dtype) for path in shapes}, sep="/")
        ocp.save_checkpointables(str(folder.absolute()), {"params": skeleton})
        # A killed process loses no byte that it has written, and the folder appears only when all is written.
        self._folder, self._shapes, self._context = folder / "params", shapes, ts.Context({"file_io_sync": False})
        self._path: str | None = None
        self._array: ts.TensorStore | None = None
        self._pending: collections.deque[tuple[ts.WriteFutures, np.ndarray]] = collections.deque()
        self._blocks, self._dtype = _Blocks(), dtype

    def block(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array for a piece, to be filled and given to `write`; any thread may ask."""
        return self._blocks.take(shape, self._dtype)

    def write(self, path: str, piece: slice, array: np.ndarray) -> None:
        """Writes one of the `pieces` of a parameter; those of one parameter follow each other.

        Args:
          array: [piece, …], of the dtype of all. It is written in the background, and is not the caller's any more.
        """
        if self._array is None or path != self._path:
            self._path, self._array = path, self._replace(path)
        while self._pending and sum(one.nbytes for _, one in self._pending) + array.nbytes > WRITING_BYTES:
            self._finish_one()
        future = self._array[piece].write(array, can_reference_source_data_indefinitely=True)
        self._pending.append((future, array))

    def wait(self) -> None:
        """Returns when all pieces are on disk."""
        while self._pending:
            self._finish_one()

    def _finish_one(self) -> None:
        future, array = self._pending.popleft()
        future.result()
        self._blocks.give_back(array)

    def _replace(self, path: str) -> ts.TensorStore:
        """Makes the array of the parameter's full shape, with the data format that Orbax chose for its one number."""
        spec = _array_spec(self._folder, path)
        metadata = ts.open(spec, context=self._context).result().spec().to_json()["metadata"]
        shape = self._shapes[path]
        chunk = list(chunk_shape(shape))
        metadata |= {"shape": list(shape)}
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunk
        codecs = metadata["codecs"]
        if codecs[0]["name"] == "sharding_indexed":
            codecs[0]["configuration"]["chunk_shape"] = chunk
            codecs = codecs[0]["configuration"]["codecs"]
        codecs[:] = [codec for codec in codecs if codec["name"] != "zstd"] + [_compression(self._dtype)]
        # Zeros are written like other numbers: Orbax takes a chunk that is left out for one that is lost.
        spec |= {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return ts.open(spec, create=True, delete_existing=True, context=self._context).result()


def _array_spec(folder: Path, path: str) -> dict:
    """Where Orbax keeps one parameter of a `params` folder, for TensorStore, the library below it."""
    return {"driver": "zarr3", "kvstore": _kvstore(folder, f"{path.replace('/', '.')}/")}


def _kvstore(folder: Path, path: str) -> dict:
    """A database of Orbax (OCDBT), or plain files, which several processes write that have no disk in common."""
    if (folder / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": path}
    return {"driver": "file", "path": f"{folder.absolute()}/{path}"}


def _stored_names(folder: Path, context: ts.Context) -> list[str]:
    """Paths of the parameters in one tree of a checkpoint; none where only `params` was written."""
    if not folder.is_dir() and folder.name != "params":
        return []
    keys = ts.KvStore.open(_kvstore(folder, ""), context=context).result().list().result()
    names = (key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json"))
    return sorted(name.replace(".", "/") for name in names)


@contextlib.contextmanager
def writing_params(
    folder: str | Path,
    config: ModelConfig,
    tokenizer: str | Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype = np.dtype(np.float32),
) -> Generator[ParamsWriter]:
    """As `save_params`, but writes one piece at a time, so that memory never holds the whole model.

    Orbax's own saving holds at least one whole parameter, of all layers, several times. Here Orbax makes the checkpoint
    with arrays of one number, and TensorStore, the library below Orbax, replaces them. The chunks of the arrays are the
    pieces, so that one layer can be read without the others.

    Args:
      shapes: path, such as "layers/mlp/up/kernel", to shape of every parameter.
      dtype: of all of them, float32 or bfloat16.

    Raises:
      CheckpointError: the folder is not empty.
    """
    with _appearing(Path(folder)) as temporary:
        write_run_files(temporary, config, tokenizer)
        writer = ParamsWriter(temporary / CHECKPOINTS / "0", shapes, dtype)
        yield writer
        writer.wait()


@contextlib.contextmanager
def _local(step: Path) -> Generator[Path]:
    """The folder of a step on a local disk; of one in a bucket, a copy of its parameters that goes with the block.

    TensorStore's drivers for buckets would read them without a copy, but know neither the credentials nor the retries
    of qwen_jax.files.
    """
    if not files.is_remote(step):
        yield step
        return
    with tempfile.TemporaryDirectory(prefix="qwen_jax-") as scratch:
        local = Path(scratch) / step.name
        log.info("downloading the parameters of %s", step)
        written = files.read_json(step / COMMIT_FILE)["files"]
        names = [name for name in written if "/" not in name or name.startswith(_PARAMETER_FOLDERS)]
        files.in_parallel(lambda name: files.copy_file(step / name, local / name), names)
        if wrong := [name for name, found in checksums(local).items() if found != written[name]]:
            raise CheckpointError(
                f"checkpoint {step} cannot be read: the checksum of {wrong[0]} is not the one in {COMMIT_FILE}"
            )
        yield local


class StoredParams:
    """The parameters of a run folder's newest checkpoint (or of the folder of one step), read in slices.

    Attributes:
      shapes: path, such as "layers/mlp/up/kernel", to shape of every stored parameter.
      dtype: "bfloat16" if all are stored so, as converted ones may be; else "float32".
      trained: paths of those that the run trained; the others were frozen.

    Raises:
      CheckpointError: no such checkpoint, or it cannot be read.
    """

    def __init__(self, path: files.PathLike):
        # The step is fixed here: a save of a running run must not change it between two parameters.
        self.folder = step_folder(path)
        self._context = ts.Context()
        held = contextlib.ExitStack()
        self._local = local = held.enter_context(_local(self.folder))
        weakref.finalize(self, held.close)
        try:
            names = {tree: _stored_names(local / tree, self._context) for tree in PARAMETER_TREES}
            prefix = _prefix(names["params"])
            opened = {
                name.removeprefix(prefix): ts.open(_array_spec(local / tree, name), context=self._context)
                for tree in PARAMETER_TREES
                for name in names[tree]
                if name.startswith(prefix)
            }
            self._arrays = {name: array.result() for name, array in opened.items()}
        except Exception as error:  # TensorStore and the file system each have their own kinds
            raise CheckpointError(f"checkpoint {self.folder} cannot be read: {one_line(error)}") from error
        self.shapes = {path: tuple(array.shape) for path, array in self._arrays.items()}
        narrow = {array.dtype.name for array in self._arrays.values()} == {"bfloat16"}
        self.dtype = "bfloat16" if narrow else "float32"
        self.trained = frozenset(name.removeprefix(prefix) for name in names["params"] if name.startswith(prefix))

    def stored_together(self, path: str) -> int:
        """Number of indices of the first axis in one chunk: reading one index reads the whole chunk."""
        shape = self._arrays[path].chunk_layout.read_chunk.shape
        assert shape is not None and shape[0] is not None  # TensorStore knows the chunks of every zarr array
        return shape[0]

    def restore(self, abstract: dict) -> dict:
        """All of them, placed as `abstract` says: nested dict of ShapeDtypeStructs with shardings.

        Raises:
          CheckpointError: they cannot be read as these shapes.
        """
        return _restored(self.folder, self._local, abstract)

    def read(self, path: str, piece: slice, dtype=None) -> np.ndarray:
        """Part of a parameter along its first axis, in the stored dtype or rounded to `dtype`.

        TensorStore rounds each chunk as it decompresses it, which takes less time and memory than rounding the result.

        Raises:
          CheckpointError: it cannot be read.
        """
        try:
            array = self._arrays[path][piece]
            return (array if dtype is None else ts.cast(array, np.dtype(dtype))).read().result()
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.folder} cannot be read: {path}: {one_line(error)}") from error


def _prefix(names: Iterable[str]) -> str:
    """What stands before the paths of the model that a run folder stands for, given those of its trained parameters."""
    return f"{POLICY}/" if any(name.startswith(f"{POLICY}/") for name in names) else ""


def _run_folder(path: files.PathLike) -> tuple[Path, int | None]:
    """(run folder, step or None) of a path that is a run folder or the folder of one step."""
    path = files.as_path(path).absolute()
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def step_folder(path: files.PathLike, step: int | None = None) -> Path:
    """The folder of a step of a run folder: the newest unless `step`, or `path` itself, names one.

    Raises:
      CheckpointError: there is none, or it holds no parameters.
    """
    run, named = _run_folder(path)
    steps = saved_steps(run)
    wanted = step if step is not None else named
    if not steps:
        raise CheckpointError(f"{run} has no checkpoint under {CHECKPOINTS}/: was it stopped before its first save?")
    if wanted is not None and wanted not in steps:
        raise CheckpointError(f"{run} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}")
    found = run / CHECKPOINTS / str(steps[-1] if wanted is None else wanted)
    if not (found / "params").is_dir():
        others = [str(run / CHECKPOINTS / str(one)) for one in steps if str(one) != found.name]
        instead = f", or name another step: {', '.join(others[-3:])}" if others else ""
        raise CheckpointError(f"checkpoint {found} holds no parameters: it was not saved whole; remove it{instead}")
    return found


def restore_params(path: files.PathLike, abstract, step: int | None = None):
    """Weights without the optimizer, placed as `abstract` says (a pytree of ShapeDtypeStructs with shardings).

    Args:
      path: a run folder (its newest checkpoint unless `step` names one), or the folder of one step.

    Raises:
      CheckpointError: no such checkpoint, or it cannot be read as these shapes.
    """
    folder = step_folder(path, step)
    with _local(folder) as local:
        return _restored(folder, local, abstract)


def _restored(named: Path, folder: Path, abstract):
    """The parameters of a step's local folder, placed as `abstract` says; errors name `named`."""
    try:
        return _loaded(folder, abstract)
    except Exception as error:  # tensorstore, Orbax and the file system each have their own kinds
        raise CheckpointError(f"checkpoint {named} cannot be read: {unreadable_reason(error)}") from error


def _loaded(folder: Path, abstract):
    import orbax.checkpoint.experimental.v1 as ocp

    store, context = ts.Context(), ocp.Context()
    trained, frozen = (set(_stored_names(folder / tree, store)) for tree in PARAMETER_TREES)
    prefix = _prefix(trained)
    context.pytree.loading.partial_load = bool(prefix)  # of several models, one
    flat = {f"{prefix}{path}": leaf for path, leaf in flatten_dict(abstract, sep="/").items()}
    if lost := sorted(flat.keys() - trained - frozen):  # a partial load would give it back as it was asked for
        raise ValueError(f"it has no parameter {lost[0]}")
    trees = {
        "params": {path: leaf for path, leaf in flat.items() if path not in frozen},
        "frozen": {path: leaf for path, leaf in flat.items() if path in frozen},
    }
    trees = {name: unflatten_dict(tree, sep="/") for name, tree in trees.items() if tree}
    with context:
        loaded = ocp.load_checkpointables(str(folder), trees)
    found = {path: leaf for tree in loaded.values() for path, leaf in flatten_dict(tree, sep="/").items()}
    return unflatten_dict({path.removeprefix(prefix): found[path] for path in flat}, sep="/")


def load_params(path: files.PathLike, step: int | None = None) -> tuple[ModelConfig, dict]:
    """(ModelConfig, nested dict of float32 numpy arrays) of a run folder or of one step's folder.

    Raises:
      CheckpointError: as `read_config` and `restore_params`.
    """
    config = read_config(_run_folder(path)[0])
    one_device = SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device),
        nn.meta.unbox(abstract_params(build_model(config))),
    )
    return config, jax.tree.map(np.asarray, restore_params(path, abstract, step))
