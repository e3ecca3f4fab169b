"""Columns computed from packed examples by a model, kept beside them: one array of numbers for each record.

A column is a folder of `rows-<first record>.npy` files, float32 [rows, sequence_length] each, and `manifest.json`,
which is written last. Files that an interrupted computation has written are kept; only the others are computed.

    cache_dir/<task>/packed-<length>-<packing>/<split>/<column>-<fingerprint>/rows-00000000.npy  manifest.json
"""

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np

from qwen_jax import files
from qwen_jax.batch_spec import Column
from qwen_jax.data.loader import ExampleLoader

MANIFEST = "manifest.json"
# 8 MB at 2,048 tokens.
ROWS_PER_FILE = 1024
# Of a file of numpy with an array of two axes.
_HEADER_BYTES = 128


class DerivedColumn:
    """A column of the records of one packed task and split, on disk.

    Attributes:
      folder: folder of its files.
      records: number of records.
      fingerprint: identity of the numbers: of the records that they were computed from, and of what computed them.
    """

    def __init__(self, packed: Path, name: str, records: int, length: int, data: str, origin: str):
        """Reads nothing.

        Args:
          packed: folder of the packed split.
          length: tokens of a record.
          data: fingerprint of the packed records.
          origin: identity of what computes the column, such as that of a model's weights.
        """
        self.fingerprint = hashlib.sha256(json.dumps([name, records, length, data, origin]).encode()).hexdigest()
        self.folder, self.records, self.length = packed / f"{name}-{self.fingerprint[:16]}", records, length
        self._open: dict[int, np.ndarray] = {}
        self._first_bytes: dict[int, int] = {}  # of the rows, in files of a bucket
        self._lock = threading.Lock()

    def starts(self) -> list[int]:
        """The first record of each file."""
        return list(range(0, self.records, ROWS_PER_FILE))

    def stop(self, start: int) -> int:
        """The record after the last one of the file that begins with `start`."""
        return min(start + ROWS_PER_FILE, self.records)

    def missing(self) -> list[int]:
        """The first records of the files that are still to be computed; unfinished files are removed."""
        if (self.folder / MANIFEST).is_file():
            return []
        if self.folder.is_dir():
            files.remove_unfinished(self.folder)
        return [start for start in self.starts() if not self._file(start).is_file()]

    def write(self, start: int, values: np.ndarray) -> None:
        """Writes a file, which appears whole or not at all.

        Args:
          start: its first record.
          values: float32 [rows, length].

        Raises:
          ValueError: a value is not finite.
        """
        if not np.isfinite(values).all():
            row = start + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise ValueError(
                f"record {row} of {self.folder.parent} has values that are not finite: the model that computes them "
                f"is damaged, or of another vocabulary"
            )
        assert values.shape == (self.stop(start) - start, self.length)
        with files.new_file(self._file(start)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, np.ascontiguousarray(values, np.float32))

    def finish(self) -> None:
        """Writes the manifest, after all files."""
        content = {"fingerprint": self.fingerprint, "records": self.records, "length": self.length}
        files.write_json(self.folder / MANIFEST, content | {"rows_per_file": ROWS_PER_FILE})

    def read(self, records: np.ndarray) -> np.ndarray:
        """The rows of these records, float32 [len(records), length]. Safe to call from several threads.

        Of files in a bucket, only these rows are requested.

        Raises:
          OSError: a file is missing or damaged; the message names it.
        """
        values = np.empty((len(records), self.length), np.float32)
        starts = records - records % ROWS_PER_FILE

        def fill(start: int) -> None:
            rows = np.flatnonzero(starts == start)
            places = records[rows] - start
            values[rows] = (
                self._requested(start, places) if files.is_remote(self.folder) else self._array(start)[places]
            )

        numbers = np.unique(starts).tolist()
        if files.is_remote(self.folder):
            files.in_parallel(fill, numbers)
        else:
            for number in numbers:
                fill(number)
        return values

    def _requested(self, start: int, places: np.ndarray) -> np.ndarray:
        """Rows of a file in a bucket."""
        path, width = self._file(start), 4 * self.length
        if start not in self._first_bytes:
            header = io.BytesIO(files.read_range(path, 0, _HEADER_BYTES))
            with self._damage_named(path):
                np.lib.format.read_magic(header)
                shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            self._check_shape(start, shape, dtype)
            self._first_bytes[start] = header.tell()
        begin = self._first_bytes[start]
        found = files.read_ranges(path, [(begin + width * row, begin + width * (row + 1)) for row in places.tolist()])
        return np.frombuffer(b"".join(found), np.float32).reshape(len(places), self.length)

    def _array(self, start: int) -> np.ndarray:
        with self._lock:
            if start not in self._open:
                with self._damage_named(self._file(start)):
                    array = np.load(self._file(start), mmap_mode="r")
                self._check_shape(start, array.shape, array.dtype)
                self._open[start] = array
            return self._open[start]

    @contextlib.contextmanager
    def _damage_named(self, path: Path) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise OSError(f"cannot read {path} ({error}): delete {self.folder} to compute it again") from error

    def _check_shape(self, start: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if shape != (self.stop(start) - start, self.length) or dtype != np.float32:
            path = self._file(start)
            raise OSError(f"{path} has the shape {shape} of {dtype}: delete {self.folder} to compute it again")

    def _file(self, start: int) -> Path:
        return self.folder / f"rows-{start:08d}.npy"


class WithColumn:
    """The examples of a loader with one more column.

    Attributes:
      columns, fingerprint: as those of the loader, with the column's.
      repeat, bytes_per_token: those of the loader.
    """

    def __init__(self, loader: ExampleLoader, column: Column, of_task: Mapping[str, DerivedColumn]):
        """Reads nothing.

        Args:
          column: name and shape of the column in a batch.
          of_task: name of each task of the loader to its column on disk.
        """
        self._loader, self._name = loader, column.name
        self.repeat, self.bytes_per_token = loader.repeat, loader.bytes_per_token
        self._columns = [of_task[task] for task in loader.manifests]
        self.columns: tuple[Column, ...] = (*loader.columns, column)
        identity = [loader.fingerprint, *(column.fingerprint for column in self._columns)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        """Examples in one epoch."""
        return len(self._loader)

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Examples [start, stop), as the loader's `read` gives them, with the column [stop - start, length]."""
        found = self._loader.read(start, stop)
        values = np.empty((stop - start, self._loader.sequence_length), np.float32)
        for number, rows, records in self._loader.places(start, stop):
            values[rows] = self._columns[number].read(np.asarray(records, np.int64))
        return found | {self._name: values}
