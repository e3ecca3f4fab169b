"""Answered examples as JSON lines that a kill cannot damage, and settings that a folder was begun with."""

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Collection, Generator, Mapping
from pathlib import Path

from qwen_jax import files

log = logging.getLogger(__name__)

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
UPLOAD_SECONDS = 30.0


def keep_settings(folder: Path, settings: Mapping) -> None:
    """Writes the settings into a folder, or compares them with those that it was begun with.

    Args:
        settings: of JSON types.

    Raises:
        ValueError: the folder was begun with others; the message names them.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, settings)
        return
    before = files.read_json(path)
    differing = [
        f"{name} {before.get(name)!r} there, {settings.get(name)!r} now"
        for name in dict.fromkeys([*before, *settings])
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds answers with other settings ({'; '.join(differing)}): choose another --output_dir, or "
            f"remove this folder"
        )


class Records:
    """The answered examples of one benchmark in `FOLDER/answers.jsonl`, one line each, in the order of their answers.

    A line that a killed process left unfinished is removed when the file is opened. Several threads may add. In a
    bucket the file is uploaded whole every UPLOAD_SECONDS and at the end, so that a kill loses the answers since.

    Attributes:
        rows: by id.
    """

    def __init__(self, folder: Path, ids: Collection[str]):
        """Opens the file, and makes it if necessary.

        Args:
            ids: of all examples of the benchmark.

        Raises:
            ValueError: a line is no answer to one of these examples, or a second one; the message has file and line.
            OSError: the file cannot be opened or written.
        """
        self.path = folder / ANSWERS
        self._lock, self._held, self._uploaded = threading.Lock(), contextlib.ExitStack(), time.monotonic()
        try:
            self._local = self._held.enter_context(self._copy())
            self._file = os.open(self._local, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._held.callback(os.close, self._file)
            self._size = self._repaired_size()
            self.rows = self._read(ids)
        except BaseException:
            self._held.close()
            raise

    @contextlib.contextmanager
    def _copy(self) -> Generator[Path]:
        """The local file to append to, which is uploaded when the block ends if it belongs into a bucket."""
        if not files.is_remote(self.path):
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="qwen_jax-") as scratch:
            local = Path(scratch) / ANSWERS
            if self.path.is_file():
                files.copy_file(self.path, local)
            yield local
            files.copy_file(local, self.path)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _repaired_size(self) -> int:
        content = self._local.read_bytes()
        size = content.rfind(b"\n") + 1
        if size < len(content):
            log.info("%s: the last line was left unfinished; its example is answered again", self.path)
            os.ftruncate(self._file, size)
        return size

    def _read(self, ids: Collection[str]) -> dict[str, dict]:
        known, rows = set(ids), {}
        for place, row in files.read_json_lines(self._local):
            where = place.replace(str(self._local), str(self.path), 1)
            name = row.get("id") if isinstance(row, dict) else None
            if not isinstance(row, dict) or name not in known or not {"extracted", "score"} <= row.keys():
                raise ValueError(f"{where}: no answer to an example of this benchmark: remove {self.path.parent}")
            if name in rows:
                raise ValueError(f"{where}: a second answer to the example {name}: remove {self.path.parent}")
            rows[name] = row
        return rows

    def add(self, row: Mapping) -> None:
        """Appends an answer, which a kill no longer loses.

        Raises:
            ValueError: the example has an answer already.
            OSError: it cannot be written whole, for example because the disk is full; the file is as before.
        """
        line = files.json_line(row).encode()
        with self._lock:
            if row["id"] in self.rows:
                raise ValueError(f"{self.path}: example {row['id']} has an answer already")
            self._append(line)
            self.rows[row["id"]] = dict(row)
            if files.is_remote(self.path) and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
                files.copy_file(self._local, self.path)
                self._uploaded = time.monotonic()

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                f"{self.path} cannot be written: {error.strerror}. The answers in it are whole; the same command goes "
                f"on after them"
            ) from error
        self._size += len(line)
