"""Removal of documents that share long n-grams with evaluation sets (report section 2.1, companion notes).

As in Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C: an n-gram of 13 words. For Chinese and
other scripts without spaces the n-gram is longer, since its tokens are characters.
"""

import csv
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet

from qwen_jax import files
from qwen_jax.curation import normalize

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz")
_JSON_BLANKS = re.compile(r"[ \t\n\r]*")
csv.field_size_limit(1 << 26)


@dataclasses.dataclass(frozen=True)
class ContaminationConfig:
    """Files of evaluation sets, and the overlap that drops a document.

    Attributes:
        files: of benchmarks; texts of all fields count.
        words: length of an n-gram most of whose tokens are words.
        characters: length of one most of whose tokens are characters of a script without spaces.
        min_shared: different n-grams that a document must share with benchmarks to be dropped.
    """

    files: tuple[str, ...] = ()
    words: int = 13
    characters: int = 26
    min_shared: int = 1


def long_ngrams(tokens: normalize.Tokens, config: ContaminationConfig) -> np.ndarray:
    """Hashes of the long n-grams of some texts, sorted, uint64 [n-grams]. No n-gram reaches over the end of a text."""
    characters = np.concatenate([[0], np.cumsum(tokens.ideograph)])
    found = []
    for size, of_characters in ((config.words, False), (config.characters, True)):
        hashes, where = normalize.windows(tokens, size)
        mostly = characters[where + size] - characters[where] > size / 2
        found.append(hashes[mostly == of_characters])
    return np.unique(np.concatenate(found))


def benchmark_texts(path: str) -> Iterator[str]:
    """Every text of a benchmark file, field by field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown suffix, or contents that do not fit the suffix.
    """
    name = path.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            with pyarrow.parquet.ParquetFile(path) as table:
                for batch in table.iter_batches():
                    yield from _texts(batch.to_pylist())
            return
        if not name.endswith(SUFFIXES):
            raise ValueError(f"unknown suffix; a benchmark has files of {', '.join(SUFFIXES)}")
        if name.endswith(".jsonl"):
            for _, row in files.read_json_lines(path):
                yield from _texts(row)
            return
        with (gzip.open if path.lower().endswith(".gz") else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as file:
            if name.endswith(".json"):
                for value in _json_values(file.read()):
                    yield from _texts(value)
            elif name.endswith((".csv", ".tsv")):
                for row in csv.reader(file, delimiter="\t" if name.endswith(".tsv") else ","):
                    yield from row
            else:
                yield file.read()
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(f"benchmark {path}: {error}") from error


def _json_values(text: str) -> Iterator[object]:
    """The JSON values of a text: one, or several one after the other, as Math23K is published."""
    decoder, place = json.JSONDecoder(), _after_blanks(text, 0)
    while True:
        value, place = decoder.raw_decode(text, place)
        yield value
        place = _after_blanks(text, place)
        if place == len(text):
            return


def _after_blanks(text: str, place: int) -> int:
    found = _JSON_BLANKS.match(text, place)
    assert found is not None  # the pattern matches the empty string
    return found.end()


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def index(config: ContaminationConfig) -> np.ndarray:
    """The long n-grams of all benchmark files, sorted, uint64 [n-grams].

    Raises:
        FileNotFoundError, ValueError: see `benchmark_texts`; or no text is long enough to have an n-gram.
    """
    parts = [long_ngrams(normalize.tokenize(list(benchmark_texts(path))), config) for path in config.files]
    merged = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    if parts and not len(merged):
        raise ValueError(f"no text in the benchmark files has {config.words} words or {config.characters} characters")
    return merged


def shared(tokens: normalize.Tokens, benchmarks: np.ndarray, config: ContaminationConfig) -> int:
    """Number of different long n-grams that texts share with `benchmarks`, the array of `index`."""
    if not len(benchmarks):
        return 0
    grams = long_ngrams(tokens, config)
    places = np.minimum(np.searchsorted(benchmarks, grams), len(benchmarks) - 1)
    return int((benchmarks[places] == grams).sum())
