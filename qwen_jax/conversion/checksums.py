"""Hashes for `--verify`: one of every array handed to the writer, one of the same array read back from disk."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm


class ChecksumError(Exception):
    """An array read back from disk differs from the written one. Not a ValueError: the arguments were right."""


def digest(array: np.ndarray) -> bytes:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


class Checksums:
    """Hashes of arrays by name; records nothing if `wanted` is False.

    Attributes:
      wanted: see above.
    """

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Records an array under its name."""
        if self.wanted:
            self._digests[name] = digest(array)

    def compare(self, stored: Iterable[tuple[str, np.ndarray]], progress: bool) -> int:
        """Compares the hashes of stored arrays with the recorded ones.

        Returns:
          The number of arrays.

        Raises:
          ChecksumError: naming the arrays that differ, are missing or were never written.
        """
        left = dict(self._digests)
        differing = []
        for name, array in tqdm(stored, total=len(left), desc="verifying", disable=not progress):
            if left.pop(name, None) != digest(array):
                differing.append(name)
        wrong = differing + [f"{name} (missing)" for name in left]
        if wrong:
            raise ChecksumError(
                f"{len(wrong)} of {len(self._digests)} tensors read back differ from what was written: "
                f"{', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}. Nothing was kept; is the disk sound?"
            )
        return len(self._digests)


def flush(path: Path) -> None:
    """Makes the operating system write the files at or below a path and forget them, so that reading is from disk."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
