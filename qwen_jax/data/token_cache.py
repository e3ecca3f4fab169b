"""SeqIO's cache of one task, written shard by shard: the first stage of `qwen_jax.data.cache`.

A piece of work (`TokenizeShard`) writes the examples of one input shard in their order, so bytes do not depend on
workers. Beside each file lies a hidden one with what was counted; an interrupted run goes on after the shards that have
one.

    folder/<split>.tfrecord-00003-of-00008   .<split>-00003-of-00008.json   then info.<split>.json, stats.<split>.json
"""

import dataclasses
import fnmatch
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_jax import files
from qwen_jax.data.example_files import (
    Example,
    decode_example,
    encode_example,
    read_records,
    restore,
    shape_of,
    write_record,
)
from qwen_jax.data.tokenizer import PinnedTokenizer
from qwen_jax.workers import Workers

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class TokenizeShard:
    """Writes one file of the cache.

    Attributes:
        task: name, for the log.
        split: of the task.
        index, count: number of the shard and of all.
        folder: of the task in the cache.
        examples: gives the examples.
        left_out: feature to the ids that are not counted as its tokens, of which SeqIO keeps a count.
        tokens: the feature whose characters are counted.
        tokenizer: of that feature.
        origin: identity of what the files are made of; files made of something else are made again.
        reads: the file that is read first, if it is known.
    """

    task: str
    split: str
    index: int
    count: int
    folder: Path
    examples: Callable[[], Iterator[Example]]
    left_out: Mapping[str, tuple[int, ...]]
    tokens: str
    tokenizer: PinnedTokenizer
    origin: str
    reads: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.split}.tfrecord-{self._place}"

    @property
    def counted(self) -> Path:
        """The file beside it."""
        return self.folder / f".{self.split}-{self._place}.json"

    @property
    def _place(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    def write(self) -> None:
        """Writes the two files."""
        tokenizer, totals = self.tokenizer.load(), _Totals(self.left_out)
        logged = time.monotonic()
        with files.new_file(self.path) as temporary, temporary.open("wb") as file:
            for example in self.examples():
                write_record(file, encode_example(example))
                totals.add(example, tokenizer.count_characters(np.asarray(example[self.tokens])))
                if time.monotonic() - logged > _PROGRESS_SECONDS:
                    logged = time.monotonic()
                    logger.info("%s %s: shard %d: %s so far", self.task, self.split, self.index + 1, totals)
        files.write_json(self.counted, {"origin": self.origin, **dataclasses.asdict(totals)}, sort_keys=True)


@dataclasses.dataclass
class _Totals:
    """What SeqIO keeps of a cache: numbers of examples, tokens and characters, and the features."""

    left_out: Mapping[str, tuple[int, ...]]
    examples: int = 0
    characters: int = 0
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    max_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    features: dict[str, dict] = dataclasses.field(default_factory=dict)

    def add(self, example: Example, characters: int) -> None:
        if not self.examples:
            self.features = {name: shape_of(value) for name, value in example.items()}
        self.examples += 1
        self.characters += characters
        for name, ids in self.left_out.items():
            value = example.get(name)
            if isinstance(value, np.ndarray) and value.dtype in (np.int32, np.int64):
                number = value.size - sum(int(np.count_nonzero(value == one)) for one in ids)
                self.tokens[name] = self.tokens.get(name, 0) + number
                self.max_tokens[name] = max(self.max_tokens.get(name, 0), number)

    def __str__(self) -> str:
        return f"{self.examples:,} documents, {sum(self.tokens.values()):,} tokens"


def tokenize(shards: Sequence[TokenizeShard], workers: Workers) -> None:
    """Writes these shards of one task, which `remove_unfinished` gave.

    Raises:
        ValueError: a row is malformed, or a worker was killed; see `Workers`.
    """
    if shards:
        label, pieces = f"{shards[0].task}: tokenizing", [(number,) for number in range(len(shards))]

        def done(pieces: Sequence[tuple]) -> list[bool]:
            return files.are_files([shards[number].counted for (number,) in pieces])

        workers(label, functools.partial(_write, shards), pieces, done, lambda number: shards[number].reads)


def _write(shards: Sequence[TokenizeShard], number: int) -> None:
    shards[number].write()


def remove_unfinished(folder: Path, split: str, shards: Sequence[TokenizeShard] = ()) -> list[TokenizeShard]:
    """Removes what an interrupted run left, but for the finished ones of `shards`; returns the others."""
    found = files.sizes_in(folder)
    written = [shard for shard in shards if shard.counted.name in found]
    same = files.in_parallel(lambda shard: files.read_json(shard.counted)["origin"] == shard.origin, written)
    finished = [shard for shard, is_same in zip(written, same, strict=True) if is_same]
    kept = {path.name for shard in finished for path in (shard.path, shard.counted)}
    patterns = (f"{split}.tfrecord-*-of-*", f".{split}-*-of-*.json", f".{split}.tfrecord-*.tmp")
    left = [name for name in found if name not in kept]
    files.remove_files([folder / name for name in left if any(fnmatch.fnmatchcase(name, one) for one in patterns)])
    return [shard for shard in shards if shard.path.name not in kept]


def totals_of(shards: list[TokenizeShard]) -> tuple[dict, dict]:
    """(statistics, features) of all shards, as SeqIO's files have them; `text_chars` is where its mixing rates look."""
    counted = files.in_parallel(lambda shard: files.read_json(shard.counted), shards)
    stats: dict[str, int] = {"examples": sum(one["examples"] for one in counted)}
    for name in sorted({name for one in counted for name in one["tokens"]}):
        stats[f"{name}_tokens"] = sum(one["tokens"].get(name, 0) for one in counted)
        stats[f"{name}_max_tokens"] = max(one["max_tokens"].get(name, 0) for one in counted)
    stats["text_chars"] = sum(one["characters"] for one in counted)
    features = next((one["features"] for one in counted if one["examples"]), {})
    return stats, features


def read_examples(path: Path, file: BinaryIO, features: Mapping[str, Mapping[str, Any]]) -> Iterator[Example]:
    """The examples in one file of the cache.

    Args:
        path: its name, for errors.
        file: the file, opened for reading.
        features: name to dtype and shape, from SeqIO's info file.

    Raises:
        ValueError: the file is damaged; the message says what to do.
    """
    try:
        for record in read_records(file):
            yield restore(decode_example(record), features)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete {path.parent} and cache the task again ({error})") from error
