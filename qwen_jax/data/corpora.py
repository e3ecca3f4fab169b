"""Corpora in files: readers of documents, without SeqIO and TensorFlow (`qwen_jax.data.sources` makes SeqIO's sources).

A corpus is a folder, a glob (`**` goes into sub-folders), a file, or several of them. Order is that of sorted paths,
then of lines. Nothing is skipped silently: a malformed row stops the reading and is named.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import logging
import os
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwen_jax import files

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
# More NUL characters than this share: the file is binary, or UTF-16 without a byte order mark.
_MAX_NUL = 0.01


def list_files(
    pattern: str | os.PathLike | Sequence[str | os.PathLike],
    suffixes: tuple[str, ...] = SUFFIXES,
    beside: tuple[str, ...] = (),
) -> list[Path]:
    """Files of a corpus, sorted, each once.

    Args:
        pattern: a folder (all its files with one of `suffixes` in any case, hidden ones left out), a file, a glob, or a
            list of these, on a local disk or in a bucket. A log line names files of a folder that have another suffix.
        suffixes: ends of names, in lower case.
        beside: ends of names that no log line has to name, such as those of pictures beside the rows that name them.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a glob matches a file with an unknown suffix.
    """
    found: set[Path] = set()
    if isinstance(pattern, files.RemotePath):
        pattern = str(pattern)
    for one in [pattern] if isinstance(pattern, str | os.PathLike) else pattern:
        one = files.as_pattern(one, "corpus")
        matches, is_folder = _matches(one)
        if is_folder:
            chosen = [path for path in matches if path.lower().endswith(suffixes)]
            left = {path for path in matches if not path.lower().endswith((*suffixes, *beside))}
            if chosen and left:
                _say_left_out(one, tuple(sorted(left)))
        else:
            chosen = matches
            unknown = sorted(path for path in chosen if not path.lower().endswith(suffixes))
            if unknown:
                raise ValueError(f"{unknown[0]}: unknown suffix; a corpus has files of {', '.join(suffixes)}")
        if not chosen:
            raise FileNotFoundError(
                f"no file of a corpus matches {one!r} (seen from {os.getcwd()}): expected a folder or glob with files "
                f"of {', '.join(suffixes)}"
            )
        found.update(files.as_path(path) for path in chosen)
    return sorted(found, key=lambda path: (files.is_remote(path), path))


def _matches(pattern: str) -> tuple[list[str], bool]:
    """The files of a folder or glob, and whether it is a folder; hidden ones are left out."""
    if files.is_remote(pattern):
        return _remote_matches(files.as_path(pattern))
    if is_folder := os.path.isdir(pattern):
        matches = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
    else:
        # A name such as `part[1].jsonl` is itself before it is a pattern.
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return [path for path in matches if os.path.isfile(path)], is_folder


def _remote_matches(path) -> tuple[list[str], bool]:
    """As `_matches`, in a bucket."""
    # Each look is a request, and what has neither a suffix nor a wildcard is a folder, most likely.
    as_folder = "." not in path.name and not any(letter in path.key for letter in "*?[")
    for is_folder in (as_folder, not as_folder):
        if found := files.find(f"{path}/**" if is_folder else path):
            return [str(one) for one in found], is_folder
    return [], False


@functools.lru_cache(maxsize=64)  # a task lists its files several times; once is enough to say it
def _say_left_out(folder: str, left_out: tuple[str, ...]) -> None:
    shown = ", ".join(os.path.relpath(path, folder) for path in left_out[:5])
    more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
    logger.warning("%s: not read, because their suffix is none of a corpus: %s%s", folder, shown, more)


def documents(
    pattern: str | os.PathLike | Sequence[str | os.PathLike], *, text_field: str = "text"
) -> Iterator[dict[str, str]]:
    """Documents of a corpus, `{"text": ..., "source": path}`, in a fixed order.

    Args:
        pattern: see `list_files`.
        text_field: field of JSON lines, column of Parquet.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: unknown suffix, malformed row (the message names file and line), or no document with text at all.
    """
    empty = True
    for path in list_files(pattern):
        for text in read_file(path, text_field=text_field):
            empty = False
            yield {"text": text, "source": str(path)}
    if empty:
        raise ValueError(f"no document with any text in {pattern!s}")


def read_file(path: Path, *, text_field: str = "text") -> Iterator[str]:
    """Texts of one file; a text file is one document, and documents without text are left out.

    Text files that are not UTF-8 are decoded as `qwen_jax.curation` decodes pages: by byte order mark, else by
    statistics of the bytes. Python sources may declare their encoding (PEP 263).

    Raises:
        ValueError: the file is damaged, binary, or has a malformed row. The message names file and row in one line.
    """
    return (text for text, _ in read_rows(path, text_field=text_field) if text)


def read_rows(
    path: Path, *, text_field: str = "text", labels: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """(text, labels) of each row of one file, also of rows without text; as `read_file` otherwise.

    Args:
        labels: further fields or columns; a row may lack them, or have null there.

    Raises:
        ValueError: as `read_file`, or a label is no text.
    """
    name = str(path).lower()
    if name.endswith(TEXT_SUFFIXES):
        yield _decode(path, path.read_bytes()), {}
    elif name.endswith(".parquet"):
        yield from _parquet(path, text_field, labels)
    else:
        for where, row in files.read_json_lines(path):
            text = _text_of(row, where, text_field)
            assert isinstance(row, dict)
            yield text, _labels(row, where, labels)


def _labels(row: Mapping[str, object], where: str, labels: Sequence[str]) -> dict[str, str]:
    found = {name: row[name] for name in labels if row.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} is {type(value).__name__}, expected a string")
    return {name: str(value) for name, value in found.items()}


def _decode(path: Path, data: bytes) -> str:
    try:
        encoding = "utf-8-sig"
        if path.suffix.lower() == ".py":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (UnicodeDecodeError, SyntaxError) as error:  # SyntaxError: a Python source declares a wrong encoding
        text = _decode_other(path, data, error)
    if text.count("\0") > _MAX_NUL * len(text):
        raise ValueError(
            f"{path}: {text.count(chr(0)):,} of its {len(text):,} characters are NUL: convert it to UTF-8, or leave it "
            "out if it is binary"
        )
    return text


def _decode_other(path: Path, data: bytes, error: Exception) -> str:
    """Text of a file that is not UTF-8."""
    advice = "convert it to UTF-8 (`iconv -t UTF-8`), or leave it out if it is binary"
    try:
        # Here, because its imports belong to the extra `curation`.
        from qwen_jax.curation.html import Unreadable, decode
    except ImportError as missing:
        raise ValueError(
            f"{path}: not UTF-8 ({error}), and its encoding cannot be found without {missing.name}: {advice}"
        ) from error
    try:
        text, encoding = decode(data)
    except Unreadable as unreadable:
        raise ValueError(
            f"{path}: not UTF-8 ({error}), nor text in any encoding that is known: {advice}"
        ) from unreadable
    try:
        data.decode(encoding)
    except UnicodeDecodeError as stray:
        logger.warning("%s: read as %s; bytes that do not fit become U+FFFD: %s", path, encoding, stray)
    else:
        logger.info("%s: read as %s", path, encoding)
    return text


def _text_of(row: object, where: str, text_field: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        fields = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with a field {text_field!r}, found {fields or 'no field'}")
    if not isinstance(row[text_field], str):
        raise ValueError(f"{where}: field {text_field!r} is {type(row[text_field]).__name__}, expected a string")
    return row[text_field]


def _opened(path: Path):
    """What pyarrow reads: a local name, which it maps into memory, or an open object of a bucket."""
    return path.open("rb") if files.is_remote(path) else contextlib.nullcontext(path)


def _parquet(path: Path, text_field: str, labels: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    row = 0
    try:
        with _opened(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{path}: expected a column {text_field!r}, found {columns}")
            present = [name for name in labels if name in table.schema_arrow.names and name != text_field]
            for batch in table.iter_batches(batch_size=1024, columns=[text_field, *present]):
                # By name: a struct column whose field has this dotted name is read along, and comes first.
                columns = {name: batch.column(name).to_pylist() for name in present}
                for index, text in enumerate(batch.column(text_field).to_pylist()):
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise ValueError(f"{path}: row {row}: {text_field!r} is {kind}, expected a string")
                    values = {name: column[index] for name, column in columns.items()}
                    yield text, _labels(values, f"{path}: row {row}", present)
                    row += 1
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        detail = " ".join(str(error).split())
        kind = OSError if files.is_remote(path) and isinstance(error, OSError) else ValueError  # of the bucket, perhaps
        raise kind(f"{path}: not a readable Parquet file past row {row}: {detail}") from error


def in_validation(text: str, share: float) -> bool:
    """Whether a document is held out where `share` of a large corpus is: a function of its text alone."""
    return _hash(text) < share * 2**64


def _hash(text: str) -> int:
    """A number in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(utf8(text), digest_size=8, key=b"validation").digest(), "little")


def validation_limit(corpus: "Corpus") -> float | int:
    """Documents whose hash is below this number are held out.

    It is `validation_share * 2**64`, unless no document of a small corpus has such a hash: then the one with the lowest
    hash is held out, so that a share always holds out something. A corpus of one document (or of copies of one) holds
    out nothing. The corpus is read only as far as its first document that is held out.
    """
    if not corpus.validation_share:
        return 0
    return _validation_limit(corpus, tuple((status.st_size, status.st_mtime) for status in corpus.statuses()))


@functools.lru_cache(maxsize=8)
def _validation_limit(corpus: "Corpus", state: tuple) -> float | int:
    del state  # part of the cache key only: files that changed are read again
    limit, lowest, several = corpus.validation_share * 2**64, None, False
    for path in corpus.files:
        for group, _ in corpus.examples(path):
            number = _hash(group)
            if number < limit:
                return limit
            several = several or (lowest is not None and number != lowest)
            lowest = number if lowest is None else min(lowest, number)
    return lowest + 1 if lowest is not None and several else 0


def utf8(text: str) -> bytes:
    """UTF-8 of a text that may hold lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        # JSON may hold lone surrogates; the tokenizer replaces them in the same way.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files and how to read them.

    `validation_share`, in [0, 1), is the share of documents held out by hash: at least one document of a corpus that
    has several, and none where it is 0. Caching ends with an error where more than `max_left_out_share` of the
    documents of a split are left out.
    """

    files: Sequence[Path]
    text_field: str = "text"
    validation_share: float = 0.01
    max_left_out_share: float = 1.0

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}, expected a share in [0, 1)")
        object.__setattr__(self, "files", tuple(self.files))  # so that it can be hashed

    def examples(self, path: Path) -> Iterator[tuple[str, dict[str, str | bytes]]]:
        """(group, `text` and `source`) of the documents of one file; those of one group are held out together."""
        for text in read_file(path, text_field=self.text_field):
            yield text, {"text": utf8(text), "source": str(path)}

    def features(self) -> dict[str, bool]:
        """Names of what `examples` gives, all strings, and whether each is a list."""
        return {"text": False, "source": False}

    def shard(self, split: str, index: int = 0, count: int = 1) -> Iterator[dict[str, Any]]:
        """The examples of a split, `train` or `validation`, in the files `index`, `index` + `count`, …

        Texts are bytes, also where `examples` gives a `str`.
        """
        limit = validation_limit(self)
        for path in self.files[index::count]:
            for group, example in self.examples(path):
                if (_hash(group) < limit) == (split == "validation"):
                    # Names of files that are not UTF-8 have surrogates.
                    yield {
                        name: value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
                        for name, value in example.items()
                    }

    def statuses(self) -> list[os.stat_result]:
        """Size and time of the last write of each file.

        Raises:
            FileNotFoundError: one is gone.
        """
        return files.statuses(list(self.files))

    def settings(self) -> dict:
        """What besides the files decides the examples; a cache keeps it, and refuses other settings."""
        return {"text_field": self.text_field}
