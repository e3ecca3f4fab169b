"""Scores of a text by models small enough for CPU workers, behind one interface: text in, number out.

Two are here: the perplexity of a character n-gram model, and a linear classifier on hashed n-grams, used for text
quality and for offensive content. Both are files of numpy arrays that hold no code. A model of another kind, such as a
checkpoint of `qwen_jax` (`qwen_jax.perplexity`), needs only to be a `Scorer`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen_jax import files
from qwen_jax.curation import normalize

_NGRAM_FORMAT, _LINEAR_FORMAT = "qwen_jax character n-grams 1", "qwen_jax linear classifier 1"
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Scorer(Protocol):
    """A score of a text. Instances are sent to workers, so they are small and load their model at the first call."""

    def __call__(self, text: str) -> float:
        """The score."""


@dataclasses.dataclass(frozen=True)
class ScoreFilter:
    """A score that each document gets, and the range in which documents are kept.

    Attributes:
        name: of the score, in documents and in the report.
        scorer: see `Scorer`.
        minimum, maximum: documents below or above are dropped; None is no bound.
        languages: documents of other languages get no such score; None is all.
    """

    name: str
    scorer: Scorer
    minimum: float | None = None
    maximum: float | None = None
    languages: Sequence[str] | None = None

    def wants(self, language: str) -> bool:
        """Whether documents of this language get the score."""
        return self.languages is None or language in self.languages

    def broken(self, value: float) -> str | None:
        """The bound that a score breaks, such as `max_perplexity`, or None. NaN breaks any bound."""
        if self.minimum is not None and not value >= self.minimum:
            return f"min_{self.name}"
        if self.maximum is not None and not value <= self.maximum:
            return f"max_{self.name}"
        return None


@dataclasses.dataclass(frozen=True)
class NgramPerplexity:
    """Perplexity per character under a character n-gram model in a file that `train_ngram` wrote.

    Interpolated Witten-Bell smoothing (Chen and Goodman 1998, section 2.6); counts lie in hashed tables, so the size of
    the model does not grow with its training text.
    """

    path: files.PathLike

    def __call__(self, text: str) -> float:
        """exp of the mean negative log probability of a character; infinite for a text without characters.

        Raises:
            ValueError: the file is no such model.
        """
        counts, followers, order, bits = _load_ngram(*_state(self.path))
        points = _points(text)
        if not len(points):
            return float("inf")
        probability = np.full(len(points), 1 / 0x110000)
        for length, grams, contexts in _grams(points, order, bits):
            of_context, kinds = counts[length, 0][contexts], followers[length][contexts]
            of_gram = np.minimum(counts[length, 1][grams], of_context)
            total = of_context + kinds
            probability = np.where(total > 0, (of_gram + kinds * probability) / np.maximum(total, 1), probability)
        return float(np.exp(-np.mean(np.log(np.maximum(probability, 1e-12)))))


def _points(text: str) -> np.ndarray:
    folded = " ".join(normalize.canonical(text).split())
    return np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def _grams(points: np.ndarray, order: int, bits: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each length of context: the slots of context and character, and of the context, of each character.

    Before the text stand as many zeros as the longest context.
    """
    padded = np.concatenate([np.zeros(order - 1, np.uint64), points])
    shift = np.uint64(64 - bits)
    context = np.full(len(points), 1, np.uint64)
    for length in range(order):
        if length:
            context = normalize.mix(context * _MIX + padded[order - 1 - length : len(padded) - length] + np.uint64(1))
        yield length, normalize.mix((context ^ _MIX) + points) >> shift, normalize.mix(context) >> shift


def train_ngram(texts: Iterable[str], path: str | os.PathLike, *, order: int = 5, bits: int = 20) -> int:
    """Trains a model for `NgramPerplexity` and writes it to `path` (.npz).

    Args:
        texts: good text, such as an encyclopedia.
        order: length of n-grams in characters.
        bits: each of the 3·order tables has 2**bits places of 4 bytes.

    Returns:
        Characters that were read.

    Raises:
        ValueError: no text, or an argument out of range.
    """
    if not 1 <= order <= 8 or not 8 <= bits <= 26:
        raise ValueError(f"order {order}, bits {bits}: expected an order in 1…8 and bits in 8…26")
    size = 1 << bits
    counts = np.zeros((order, 2, size), np.uint32)
    followers = np.zeros((order, size), np.uint32)
    read = 0
    for text in texts:
        points = _points(text)
        read += len(points)
        for length, grams, contexts in _grams(points, order, bits):
            unique, first = np.unique(grams, return_index=True)
            new = counts[length, 1][unique] == 0
            np.add.at(followers[length], contexts[first[new]], 1)
            np.add.at(counts[length, 1], grams, 1)
            np.add.at(counts[length, 0], contexts, 1)
    if not read:
        raise ValueError("no text to train the n-gram model on")
    _save(
        path,
        {"format": _NGRAM_FORMAT, "order": order, "bits": bits, "characters": read},
        counts=counts,
        followers=followers,
    )
    return read


def _state(path: files.PathLike) -> tuple[str, int, int]:
    """A local file, its size and its time: the keys of the caches of models, so that one that changed is read again."""
    path = os.fspath(files.as_path(path))
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _load_ngram(path: str, size: int, modified_ns: int):
    del size, modified_ns  # keys alone
    settings, arrays = _load(path, _NGRAM_FORMAT)
    counts, followers = (arrays[name].astype(np.float32) for name in ("counts", "followers"))
    return counts, followers, settings["order"], settings["bits"]


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """Probability of the positive class by logistic regression, in a file that `save_linear` wrote."""

    path: files.PathLike

    def __call__(self, text: str) -> float:
        """Probability in [0, 1].

        Raises:
            ValueError: the file is no such model.
        """
        settings, arrays = _load_linear(*_state(self.path))
        slots, values = features(text, settings["bits"])
        logit = float(values @ arrays["weights"][slots] + arrays["bias"][0])
        return float(1 / (1 + np.exp(-np.clip(logit, -60, 60))))


def features(text: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashed single tokens and pairs of tokens: int64 slots in [0, 2**bits), ascending, and float64 values of norm 1.

    A value is 1 + log of the number of occurrences, before division by the Euclidean norm.
    """
    tokens = normalize.tokenize([text])
    grams = np.concatenate([tokens.hashes, normalize.windows(tokens, 2)[0]])
    slots, numbers = np.unique(grams >> np.uint64(64 - bits), return_counts=True)
    values = 1 + np.log(numbers)
    return slots.astype(np.int64), values / max(np.linalg.norm(values), 1e-12)


def save_linear(
    path: str | os.PathLike, weights: np.ndarray, bias: float, *, bits: int, classes: Sequence[str]
) -> None:
    """Writes a model for `LinearClassifier`: float [2**bits] weights; `classes` names negative and positive."""
    _save(
        path,
        {"format": _LINEAR_FORMAT, "bits": bits, "classes": list(classes)},
        weights=np.asarray(weights, np.float32),
        bias=np.asarray([bias], np.float64),
    )


@functools.lru_cache(maxsize=8)
def _load_linear(path: str, size: int, modified_ns: int):
    del size, modified_ns  # keys alone
    return _load(path, _LINEAR_FORMAT)


def _save(path: str | os.PathLike, settings: dict, **arrays: np.ndarray) -> None:
    with files.new_file(Path(path)) as temporary, temporary.open("wb") as file:
        described = np.frombuffer(json.dumps(settings).encode(), np.uint8)
        # By the stub of NumPy, any array of `arrays` might be its option `allow_pickle`.
        np.savez_compressed(file, settings=described, **arrays)  # ty: ignore[invalid-argument-type]


def _load(path: str, kind: str) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        with np.load(files.as_path(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        settings = json.loads(arrays.pop("settings").tobytes())
        found = settings["format"]
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zip and JSON raise many kinds for a file of another format
        raise ValueError(f"{path}: not a model of this project: {error}") from error
    if found != kind:
        raise ValueError(f"{path}: expected a file of {kind!r}, found {found!r}")
    return settings, arrays
