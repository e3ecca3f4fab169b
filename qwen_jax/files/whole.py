"""Files and folders that appear whole or not at all, on local disks and in buckets.

A local file or folder gets its name by a rename. An object of a bucket appears whole by itself; a folder of objects
counts as complete by the one that is written last. Within `UploadsBehind`, objects follow a little later.
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path

from . import objects, uploads
from .paths import PathLike, RemotePath, as_path


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def new_file(final: PathLike) -> Generator[Path]:
    """A temporary local path that becomes `final` when the block ends without an error.

    It lies beside a local `final` and is renamed. For a bucket it lies in the folder of temporary files (TMPDIR), and
    is uploaded as one object: readers see the old content or the new one.
    """
    final = as_path(final)
    if isinstance(final, RemotePath):
        with contextlib.ExitStack() as scratch:
            folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix="qwen_jax-"))
            local = Path(folder) / (final.name or "object")
            yield local
            uploads.do(lambda: objects.put(final, local), local.stat().st_size, scratch.pop_all())
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
    try:
        yield temporary
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(final: PathLike, last: str | None = None) -> Generator[Path]:
    """A temporary local folder that becomes `final` when the block ends without an error, and is removed otherwise.

    Where two workers make the same folder, the first one stays: they are equal.

    Args:
      last: for a bucket, name of the file of the folder that readers take as the sign that it is complete. It is
        uploaded after all others. A killed upload leaves a folder without it, which the next one overwrites.

    Raises:
      ValueError: `final` is in a bucket, and `last` is not given or was not written.
    """
    final = as_path(final)
    if isinstance(final, RemotePath):
        if last is None:
            raise ValueError(f"{final}: a folder of a bucket needs the name of the object that completes it (last=)")
        with contextlib.ExitStack() as scratch:
            folder = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="qwen_jax-")))
            yield folder
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            uploads.do(lambda: upload_folder(folder, final, last), size, scratch.pop_all())
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(final)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload_folder(local: Path, final: RemotePath, last: str) -> None:
    """Uploads the files of a local folder, `last` after all others; does nothing where `final` has it already.

    Objects that an unfinished upload left there under other names are deleted.

    Raises:
      ValueError: there is no file `last`.
    """
    if not (local / last).is_file():
        raise ValueError(f"{final}: the folder has no file {last}, which completes it")
    there = {one["path"] for one in objects.list_objects(final)}
    if (final / last).key in there:
        return
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    objects.delete(final, sorted(there - {(final / name).key for name in names}))
    objects.in_parallel(lambda name: objects.put(final / name, local / name), [name for name in names if name != last])
    objects.put(final / last, local / last)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes the temporary files and folders that a killed process left directly in `folder`; a bucket has none.

    Args:
      name: final name of the file or folder; by default any.
    """
    if isinstance(folder, RemotePath):
        return
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 32}.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_tree(path: PathLike, first: str | None = None) -> None:
    """Removes a file, or a folder with everything in it; a missing one is none to remove.

    Args:
      first: for a bucket, name of the object that is deleted before all others: the one that completes the folder.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        if not path.key:
            raise ValueError(f"{path}: a whole bucket is not removed")
        if first is not None:
            objects.delete(path, [(path / first).key])
        # The object of its own name apart from the others: it is there hardly ever, and Cloud Storage deletes nothing
        # after one that is missing.
        below = [lambda: [one["path"] for one in objects.list_objects(path)], lambda: [path.key]]
        objects.in_parallel(lambda keys: objects.delete(path, keys()), below)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_files(paths: Sequence[Path]) -> None:
    """Removes files; a missing one is none to remove. Objects of a bucket go together."""
    remote = [path for path in paths if isinstance(path, RemotePath)]
    for bucket in {(path.scheme, path.bucket): path for path in remote}.values():
        keys = [one.key for one in remote if (one.scheme, one.bucket) == (bucket.scheme, bucket.bucket)]
        objects.delete(bucket, keys)
    for path in paths:
        if not isinstance(path, RemotePath):
            path.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8; a reader sees the old content or the new one, never a part."""
    path = as_path(path)
    if isinstance(path, RemotePath):
        uploads.do(lambda: path.write_text(text), len(text))
        return
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: object, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Writes JSON in UTF-8, whole or not at all."""
    write_text(path, _escaped(json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=sort_keys)) + "\n")


def json_line(value: object) -> str:
    """A line of JSON with its line end. Lone surrogates, which JSON may have and UTF-8 may not, make it ASCII."""
    line = json.dumps(value, ensure_ascii=False)
    return (line if line == _escaped(line) else json.dumps(value)) + "\n"


def _escaped(text: str) -> str:
    # What Python writes for a character that UTF-8 lacks is its escape in JSON.
    return text.encode("utf-8", "backslashreplace").decode()


def copy_file(source: PathLike, final: PathLike) -> None:
    """Copies a file; the copy appears whole or not at all. Within a bucket, the server copies."""
    source, final = as_path(source), as_path(final)
    if isinstance(source, RemotePath) and isinstance(final, RemotePath) and objects.copy_within(source, final):
        return
    with new_file(final) as temporary:
        if isinstance(source, RemotePath):
            objects.download(source, temporary)
        else:
            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def local_copy(path: PathLike) -> Generator[Path]:
    """A local path with the content of `path`, for libraries that open files by name.

    A local path is given as it is. A file or folder of a bucket is downloaded into the folder of temporary files, and
    the copy goes when the block ends.

    Raises:
      FileNotFoundError: the bucket has neither an object nor a folder of that name.
    """
    path = as_path(path)
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="qwen_jax-") as scratch:
        local = Path(scratch) / (path.name or path.bucket)
        if path.is_file():
            objects.download(path, local)
        else:
            download_folder(path, local)
        yield local


def download_folder(folder: RemotePath, local: Path) -> None:
    """Downloads all objects below a folder of a bucket.

    Raises:
      FileNotFoundError: there are none.
    """
    found = list(objects.list_objects(folder))
    if not found:
        raise FileNotFoundError(f"{folder}: no such object or folder")
    for one in found:
        _download_below(folder, one["path"], local)


def _download_below(folder: RemotePath, key: str, local: Path) -> None:
    source = RemotePath(folder.scheme, folder.bucket, key)
    target = local / os.fspath(source.relative_to(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    objects.download(source, target)
