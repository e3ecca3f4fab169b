"""Writing an object in parts, so that neither memory nor a local disk holds the whole of it."""

import contextlib
from collections.abc import Generator
from typing import BinaryIO

from . import objects
from .paths import PathLike, RemotePath, as_path
from .whole import new_file


@contextlib.contextmanager
def new_stream(final: PathLike) -> Generator[BinaryIO]:
    """A file opened for writing bytes, which appears as `final` when the block ends without an error.

    An object of a bucket is uploaded in parts while it is written. After an error or a kill no object is there; its
    parts stay until a lifecycle rule of the bucket removes incomplete uploads.

    Raises:
      FileNotFoundError, PermissionError, OSError: one line with the path.
    """
    final = as_path(final)
    if not isinstance(final, RemotePath):
        with new_file(final) as temporary, open(temporary, "wb") as stream:
            yield stream
        return
    upload = objects.Upload(final)
    yield upload  # ty: ignore[invalid-yield]
    upload.finish()
