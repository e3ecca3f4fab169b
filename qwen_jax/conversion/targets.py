"""Targets of a conversion, which appear whole or not at all, on local disks and in buckets."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import cast

from qwen_jax import files
from qwen_jax.checkpoints import run_folder
from qwen_jax.conversion import adapters, gguf_file, huggingface
from qwen_jax.conversion.mapping import FORMATS

# Files that make a folder a model: in a bucket, they are written last.
COMPLETING = {adapters.NAME: adapters.CONFIG_FILE, **dict.fromkeys(FORMATS, huggingface.CONFIG_FILE)}

# Seconds after which the target of a killed conversion in a bucket is free.
LEASE = 60.0


def check_free(target: Path, is_file: bool) -> None:
    """Refuses a target that exists; an empty folder may become a folder.

    Raises:
      ValueError: it exists.
    """
    if target.exists() and (is_file or not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: choose another target, or remove it")


@contextlib.contextmanager
def staged_target(target: Path, target_format: str) -> Generator[tuple[Path, Path]]:
    """A local folder for scratch, and the path to write, which is `target` when the block ends without an error.

    Raises:
      ValueError: another conversion writes the target; in a bucket, something else is there.
    """
    staged = _in_bucket(target, target_format) if files.is_remote(target) else _beside(target)
    with staged as places:
        yield places


@contextlib.contextmanager
def _beside(target: Path) -> Generator[tuple[Path, Path]]:
    """A hidden folder beside `target`, and a path in it that becomes `target` when the block ends without an error.

    A killed conversion leaves the hidden folder, which the next one to the same target clears. The lock tells that
    from a conversion that is still running.
    """
    stage = target.with_name(f".{target.name}.converting")
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    stage.mkdir(exist_ok=True)
    lock = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another conversion to {target} is running: wait, or choose another target") from error
        try:
            _clear(stage)
            yield stage, stage / "result"
            (stage / "result").rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(lock)
        if not target.exists():
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: someone else has put something there
                    folder.rmdir()


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


@contextlib.contextmanager
def _in_bucket(target: Path, target_format: str) -> Generator[tuple[Path, Path]]:
    """A local folder, and where to write.

    Safetensors go straight to the bucket, and the caller writes config.json last, without which the folder is no
    model. Other formats are written into the local folder and uploaded, the file that completes them last. A lock
    object beside the target tells what a killed conversion left, which the next one removes, from files of others.
    """
    if target == target.parent:
        raise ValueError(f"{target} is a whole bucket: name a folder in it")
    lock = f".{target.name}.converting"
    left = (target.parent / lock).is_file()
    with files.locked(target.parent, lock, LEASE):
        completing = COMPLETING.get(target_format, run_folder.CONFIG_FILE)
        if left and not target.is_file() and not (target / completing).is_file():
            files.remove_tree(target)
        check_free(target, target_format == gguf_file.NAME)
        try:
            with tempfile.TemporaryDirectory(prefix="qwen_jax-") as scratch:
                local = Path(scratch) / "result"
                yield Path(scratch), target if target_format in FORMATS else local
                if target_format == gguf_file.NAME:
                    files.copy_file(local, target)
                elif target_format not in FORMATS:
                    if completing == run_folder.CONFIG_FILE:
                        run_folder.write_commit_files(local)
                    files.upload_folder(local, cast(files.RemotePath, target), completing)
        except BaseException:
            if target_format != gguf_file.NAME:
                files.remove_tree(target, first=completing)
            raise
