"""Corpora in files: how documents are read, and how SeqIO sees them.

A corpus is a folder, a glob (`**` goes into sub-folders) or several of them. Order is that of sorted paths, then of
lines. Nothing is skipped silently: a malformed row stops the reading and is named.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import seqio
import tensorflow as tf
import zstandard

from qwen_jax.files import as_pattern

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")


def list_files(pattern: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """Files of a corpus, sorted, each once.

    Args:
        pattern: a folder (all its files with one of `SUFFIXES`, hidden ones left out), a glob, or a list of these.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a glob matches a file whose suffix says nothing about its format.
    """
    found: set[Path] = set()
    for one in [pattern] if isinstance(pattern, str | os.PathLike) else pattern:
        one = as_pattern(one, "corpus")
        if os.path.isdir(one):
            matches = glob.glob(os.path.join(glob.escape(one), "**", "*"), recursive=True)
            files = [path for path in matches if path.endswith(SUFFIXES) and os.path.isfile(path)]
        else:
            files = [path for path in glob.glob(one, recursive=True) if os.path.isfile(path)]
            unknown = sorted(path for path in files if not path.endswith(SUFFIXES))
            if unknown:
                raise ValueError(f"{unknown[0]}: unknown suffix; a corpus has files of {', '.join(SUFFIXES)}")
        if not files:
            raise FileNotFoundError(
                f"no file of a corpus matches {one!r} (seen from {os.getcwd()}): expected a folder or glob with files "
                f"of {', '.join(SUFFIXES)}"
            )
        found.update(Path(path) for path in files)
    return sorted(found)


def documents(
    pattern: str | os.PathLike | Sequence[str | os.PathLike], *, text_field: str = "text"
) -> Iterator[dict[str, str]]:
    """Documents of a corpus, `{"text": ..., "source": path}`, in a fixed order.

    Args:
        pattern: see `list_files`.
        text_field: field of JSON lines, column of Parquet.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: unknown suffix, malformed row (file and line are named), or no document with text at all.
    """
    empty = True
    for path in list_files(pattern):
        for text in read_file(path, text_field=text_field):
            empty = False
            yield {"text": text, "source": str(path)}
    if empty:
        raise ValueError(f"no document with any text in {pattern!s}")


def read_file(path: Path, *, text_field: str = "text") -> Iterator[str]:
    """Texts of one file; a text file is one document, and documents without text are left out."""
    name = str(path)
    if name.endswith(TEXT_SUFFIXES):
        texts: Iterator[str] = iter([path.read_bytes().decode("utf-8", errors="replace")])
    elif name.endswith(".parquet"):
        texts = _parquet(path, text_field)
    else:
        texts = _json_lines(path, text_field)
    return (text for text in texts if text)


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_text(line, f"{path}:{number}", text_field)
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError, OSError) as error:
        raise ValueError(f"{path}: cannot be read past line {number}: {error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return path.open("rb")


def _json_text(line: bytes, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or text_field not in row:
        fields = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with a field {text_field!r}, found {fields or 'no field'}")
    if not isinstance(row[text_field], str):
        raise ValueError(f"{where}: field {text_field!r} is {type(row[text_field]).__name__}, expected a string")
    return row[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{path}: expected a column {text_field!r}, found {columns}")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise ValueError(f"{path}: row {row}: {text_field!r} is {kind}, expected a string")
                    yield text
                    row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def in_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the validation split: by a hash of its text, so for ever and everywhere."""
    digest = hashlib.blake2b(_utf8(text), digest_size=8, key=b"validation").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # JSON may hold lone surrogates; the tokenizer replaces them in the same way.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files and how to read them. `validation_share`, in [0, 1), is the share of documents held out by hash."""

    files: Sequence[Path]
    text_field: str = "text"
    validation_share: float = 0.01

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}, expected a share in [0, 1)")


class DocumentSource(seqio.DataSource):
    """SeqIO source of a corpus of files, with splits `train` and `validation`.

    Files are dealt to at most `num_shards` input shards, which Beam workers read in parallel.

    Args:
        corpus: called when the source is used, not when the task is registered: what it reads may come from gin.
        num_shards: upper bound on input shards.
    """

    def __init__(self, corpus: Callable[[], Corpus], *, num_shards: int = 64):
        super().__init__(splits=("train", "validation"))
        self._corpus, self._num_shards = corpus, num_shards

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a file is the smallest piece."""
        return False

    def list_shards(self, split: str) -> list[str]:
        """Names of the input shards."""
        self._check(split)
        count = min(self._num_shards, len(self._corpus().files))
        return [f"files-{index:05d}-of-{count:05d}" for index in range(count)]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length=None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Documents as `{"text": string, "source": string}` scalars; the order is fixed, whatever `shuffle` says."""
        del shuffle, seed, sequence_length, use_cached, num_epochs
        self._check(split)
        corpus = self._corpus()
        count, index = (shard_info.num_shards, shard_info.index) if shard_info else (1, 0)

        def generate():
            for path in corpus.files[index::count]:
                for text in read_file(path, text_field=corpus.text_field):
                    if in_validation(text, corpus.validation_share) == (split == "validation"):
                        yield {"text": _utf8(text), "source": str(path)}

        signature = {name: tf.TensorSpec([], tf.string) for name in ("text", "source")}
        return tf.data.Dataset.from_generator(generate, output_signature=signature)

    def describe(self) -> dict:
        """What a cache remembers of its corpus, so that another one is not mistaken for it."""
        corpus = self._corpus()
        base = os.path.commonpath([path.parent for path in corpus.files])
        listing = [[os.path.relpath(path, base), path.stat().st_size] for path in corpus.files]
        return {
            "files": len(listing),
            "file_bytes": sum(size for _, size in listing),
            "listing": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "text_field": corpus.text_field,
            "validation_share": corpus.validation_share,
        }

    def _check(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"no split {split!r} in a corpus of files; there are {', '.join(self.splits)}")


class TfdsSource(seqio.TfdsDataSource):
    """A TFDS dataset that is on disk already. SeqIO's own source would start to download and prepare what is missing.

    Args:
        name: name, configuration and version, such as `wikipedia/20230601.en:1.0.0`.
        splits: split names here to splits or slices there.
    """

    def __init__(self, name: str, splits: Mapping[str, str]):
        super().__init__(name, splits=splits, read_only=True)

    def list_shards(self, split: str) -> Sequence[str]:
        """Names of the files.

        Raises:
            FileNotFoundError: the dataset is not on disk; the message says how to get it.
        """
        self._check()
        return super().list_shards(split)

    def get_dataset(self, split: str = "train", *args, **kwargs) -> tf.data.Dataset:
        """As in SeqIO; raises like `list_shards`."""
        self._check()
        return super().get_dataset(split, *args, **kwargs)

    def _check(self) -> None:
        loader = self.tfds_dataset
        if not loader.builder.info.splits:
            name = loader.name.partition(":")[0]
            raise FileNotFoundError(
                f"the TFDS dataset {loader.name} is not in {loader.builder.data_path}: get it with `tfds build {name}` "
                "(public corpora are large: see https://www.tensorflow.org/datasets/catalog), and set TFDS_DATA_DIR "
                "if it lies elsewhere"
            )
