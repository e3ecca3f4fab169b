"""Run folders as source and target of a conversion: parameters read by layer, written piece by piece.

`scanned` is the layout of training: each parameter of a block is one array with a leading axis of layers. `unscanned`
has one sub-tree per block, `layers_0/mlp/up/kernel` and so on, for code without `nn.scan`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.checkpoints import arrays, run_folder
from qwen_jax.conversion import huggingface
from qwen_jax.conversion.checksums import Checksums
from qwen_jax.conversion.external import listing
from qwen_jax.conversion.mapping import LAYER_PREFIX, Weights, copy_moved, is_stacked, parameter_shapes
from qwen_jax.conversion.pipelines import staged
from qwen_jax.models.config import ModelConfig

SCANNED, UNSCANNED = "scanned", "unscanned"
LAYOUTS = (SCANNED, UNSCANNED)


def unscanned_path(path: str, layer: int) -> str:
    """Path of one block's own parameter: `layers/mlp/up/kernel` of block 3 is `layers_3/mlp/up/kernel`."""
    return path.replace(LAYER_PREFIX, f"{LAYER_PREFIX.rstrip('/')}_{layer}/", 1)


def layout_shapes(config: ModelConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Path to shape of every array of a run folder in this layout."""
    shapes = dict(parameter_shapes(config))
    if layout == SCANNED:
        return shapes
    own = {
        unscanned_path(path, layer): shape[1:]
        for path, shape in shapes.items()
        if is_stacked(path)
        for layer in range(shape[0])
    }
    return own | {path: shape for path, shape in shapes.items() if not is_stacked(path)}


class RunFolder:
    """The parameters of a run folder (its newest checkpoint, or one step's folder); a `Weights` of mapping.py.

    Attributes:
      dtype: see `Weights`.
      layout: "scanned" or "unscanned".
      trained: paths of the parameters that the run trained; the others were frozen.

    Raises:
      ValueError: the folder holds no checkpoint, or one of another model than its configuration; from `read`: the
        checkpoint cannot be read.
    """

    position_limit = None

    def __init__(self, path: files.PathLike):
        path = files.as_path(path).absolute()
        in_step = path.parent.name == run_folder.CHECKPOINTS
        self.config = run_folder.read_config(path.parent.parent if in_step else path)
        self._stored = arrays.StoredParams(path)
        self.trained, self.dtype = self._stored.trained, self._stored.dtype
        first = unscanned_path(LAYER_PREFIX, 0)
        self.layout = UNSCANNED if any(name.startswith(first) for name in self._stored.shapes) else SCANNED
        self._check()
        # Layers that one chunk holds together: path to (first of them, dtype as asked for, array).
        self._kept: dict[str, tuple[int, Any, np.ndarray]] = {}

    def _check(self) -> None:
        expected, found = layout_shapes(self.config, self.layout), self._stored.shapes
        shapes = [
            f"{path} is {list(found[path])}, expected {list(shape)}"
            for path, shape in expected.items()
            if path in found and found[path] != shape
        ]
        problems = [
            f"{len(names)} {what}: {listing(names)}"
            for what, names in (
                ("missing", [path for path in expected if path not in found]),
                ("unexpected", sorted(found.keys() - expected.keys())),
                ("of wrong shape", shapes),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"parameters of {self._stored.folder} do not fit the run's {run_folder.CONFIG_FILE}: "
                f"{'. '.join(problems)}. Are the two of the same run?"
            )

    def restore(self, abstract: dict) -> dict:
        """See `StoredParams.restore`; each device reads its shard. Layout "scanned" alone."""
        return self._stored.restore(abstract)

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """See `Weights.read`. Reads and keeps the layers that the checkpoint stores together."""
        if layer is None:
            return self._stored.read(path, slice(None), dtype)
        if self.layout == UNSCANNED:
            return self._stored.read(unscanned_path(path, layer), slice(None), dtype)
        together = self._stored.stored_together(path)
        start = layer - layer % together
        kept_start, kept_dtype, block = self._kept.pop(path, (None, None, None))
        if block is None or (kept_start, kept_dtype) != (start, dtype):
            block = self._stored.read(path, slice(start, start + together), dtype)
        if layer + 1 < min(start + together, parameter_shapes(self.config)[path][0]):
            self._kept[path] = (start, dtype, block)
        return block[layer - start]


def write_run_folder(
    folder: Path,
    source: Weights,
    dtype: str,
    tokenizer: Path | None,
    layout: str,
    checksums: Checksums,
    progress: bool,
) -> None:
    """Writes a run folder of weights; memory holds one parameter at a time, of a stacked one a single block.

    Args:
      folder: must not exist; appears whole or not at all.
      dtype: of the stored parameters, "float32" or "bfloat16"; those who read them widen them.
      tokenizer: a .tiktoken file, or None.
      checksums: records every piece.
      progress: whether to show a progress bar.
    """
    shapes = layout_shapes(source.config, layout)
    kind = huggingface.numpy_dtype(dtype)
    total = sum(kind.itemsize * int(np.prod(shape)) for shape in shapes.values())
    with (
        arrays.writing_params(folder, source.config, tokenizer, shapes, kind) as writer,
        contextlib.closing(
            staged(_read_pieces(source, layout), (functools.partial(_made, writer.block),), _bytes)
        ) as made,
        tqdm(total=total, unit="B", unit_scale=True, desc="parameters", disable=not progress) as bar,
    ):
        for path, piece, array in made:
            checksums.add(_piece_name(path, piece), array)
            writer.write(path, piece, array)
            bar.update(array.nbytes)
            del array


def _read_pieces(source: Weights, layout: str) -> Iterator[tuple[str, slice, np.ndarray | list[np.ndarray]]]:
    """(path, piece, its content as it is stored, or that of each of its layers), in the order of the paths."""
    for path, shape in parameter_shapes(source.config).items():
        if not is_stacked(path):
            whole = source.read(path, None)
            for piece in arrays.pieces(shape):
                yield path, piece, whole[piece]
            del whole
        elif layout == SCANNED:
            for piece in arrays.pieces(shape):
                yield path, piece, [source.read(path, layer) for layer in range(piece.start, piece.stop)]
        else:
            for layer in range(shape[0]):
                own = source.read(path, layer)
                for piece in arrays.pieces(shape[1:]):
                    yield unscanned_path(path, layer), piece, own[piece]


def _made(
    block: Callable[[tuple[int, ...]], np.ndarray], read: tuple[str, slice, np.ndarray | list[np.ndarray]]
) -> tuple[str, slice, np.ndarray]:
    """(path, piece, what was read, copied into a `block` of its shape)."""
    path, piece, content = read
    if isinstance(content, np.ndarray):
        made = block(content.shape)
        copy_moved(content, made)
        return path, piece, made
    made = block((len(content), *content[0].shape))
    for layer, array in enumerate(content):
        copy_moved(array, made[layer])
    return path, piece, made


def _bytes(item: tuple[str, slice, np.ndarray | list[np.ndarray]]) -> int:
    content = item[-1]
    return content.nbytes if isinstance(content, np.ndarray) else sum(array.nbytes for array in content)


def read_again(folder: Path):
    """(name, array) of every stored piece, by the names that `write_run_folder` gives its checksums."""
    stored = arrays.StoredParams(folder)
    for path, shape in stored.shapes.items():
        for piece in arrays.pieces(shape):
            yield _piece_name(path, piece), stored.read(path, piece)


def _piece_name(path: str, piece: slice) -> str:
    return f"{path}[{piece.start}:{piece.stop}]"
