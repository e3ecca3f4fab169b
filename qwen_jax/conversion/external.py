"""Weights in files of others: where each tensor lies, whether all are there, and our parameters read out of them."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax import files
from qwen_jax.conversion.mapping import (
    ExternalTensor,
    Format,
    external_shape,
    external_tensors,
    from_external,
    parameter_shapes,
)
from qwen_jax.files import objects
from qwen_jax.models.config import ModelConfig

READ_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


def listing(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and the number of the others."""
    shown = ", ".join(list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      dtype: its name in safetensors and GGUF; only those of READ_DTYPES can be read.
      offset: position of its first byte in the file.
      version: in a bucket, what the object was when its header was read; reading another one is refused.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    version: str | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of it, by a plain read: the pages of a memory map would count as ours.

        Raises:
          OSError: the file is shorter, or cannot be read, or is another object of the bucket by now.
        """
        dtype = READ_DTYPES[self.dtype]
        row = math.prod(self.shape[1:]) * dtype.itemsize
        size, offset = (stop - start) * row, self.offset + start * row
        if files.is_remote(self.file):
            raw = self._download(offset, size)
        else:
            raw = np.fromfile(self.file, np.uint8, size, offset=offset)
        return raw.view(dtype).reshape(stop - start, *self.shape[1:])

    def _download(self, offset: int, size: int) -> np.ndarray:
        raw = np.empty(size, np.uint8)

        def fetch(first: int) -> None:
            last = min(first + objects.PART, size)
            data = objects.get(self.file, (offset + first, offset + last), self.version)
            raw[first:last] = np.frombuffer(data, np.uint8)

        files.in_parallel(fetch, list(range(0, size, objects.PART)))
        return raw


class ExternalWeights:
    """The weights of a checkpoint in an external format; a `Weights` of mapping.py.

    The constructor checks that every tensor of the configuration exists and has the right shape.

    Attributes:
      config: configuration of the model, as the checkpoint describes it.
      dtype: "bfloat16" if all tensors are, else "float32", which holds all dtypes that can be read.
      position_limit: max_position_embeddings of a qwen config.json; None in other formats.

    Raises:
      ValueError: tensors are missing, unexpected, of the wrong shape or of an unknown dtype; the message names them.
    """

    position_limit: int | None = None

    def __init__(
        self, where: str | os.PathLike, table: Format, config: ModelConfig, stored: Mapping[str, StoredTensor]
    ):
        self.where, self.config, self._stored = where, config, stored
        expected = external_tensors(table, config)
        self._check(table, {tensor.name: tensor.shape for tensor in expected})
        # Where each of our parameters lies: its tensor (by layer) and its first row in it.
        self._places: dict[tuple[str, int | None], tuple[ExternalTensor, int]] = {}
        shapes = parameter_shapes(config)
        for tensor in expected:
            start = 0
            for part in tensor.mapping.parts:
                self._places[part, tensor.layer] = (tensor, start)
                start += external_shape(tensor.mapping.layout, shapes[part][0 if tensor.layer is None else 1 :])[0]
        kinds = {stored[tensor.name].dtype for tensor in expected}
        self.dtype = "bfloat16" if kinds == {"BF16"} else "float32"

    def _check(self, table: Format, expected: dict[str, tuple[int, ...]]) -> None:
        known = {name for name in self._stored if not re.fullmatch(table.redundant, name)}
        copy = table.tied_output if self.config.tie_embeddings else None
        missing = [name for name in expected if name not in known]
        extra = sorted(known - expected.keys() - {copy})
        present = [name for name in expected if name in known]
        shapes = [
            f"{name} is {list(self._stored[name].shape)}, expected {list(expected[name])}"
            for name in present
            if self._stored[name].shape != expected[name]
        ]
        dtypes = [
            f"{name} is {self._stored[name].dtype}" for name in present if self._stored[name].dtype not in READ_DTYPES
        ]
        problems = [
            f"{len(found)} {what}: {listing(found)}"
            for what, found in (
                ("missing", missing),
                ("unexpected", extra),
                ("of wrong shape", shapes),
                (f"of a dtype other than {', '.join(READ_DTYPES)}", dtypes),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"tensors of {self.where} do not fit its configuration ({table.architecture}): "
                f"{'. '.join(problems)}. Was the download complete, and are the two of the same model?"
            )
        if copy is not None and copy in self._stored:
            self._check_copy(copy, table.tensors[0].external)

    def _check_copy(self, copy: str, embedding: str) -> None:
        first, second = (self._stored[name].read(0, self._stored[name].shape[0]) for name in (copy, embedding))
        if first.shape != second.shape or not np.array_equal(first, second):
            raise ValueError(
                f"{self.where}: its configuration says tie_word_embeddings, but {copy} differs from {embedding}: set "
                "tie_word_embeddings to false if the model was trained untied"
            )

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """See `Weights.read`: only the rows that hold this parameter are read."""
        tensor, start = self._places[path, layer]
        shape = parameter_shapes(self.config)[path][0 if layer is None else 1 :]
        rows = external_shape(tensor.mapping.layout, shape)[0]
        return from_external(tensor.mapping.layout, self._stored[tensor.name].read(start, start + rows), shape)
