"""Preprocessors of SeqIO as functions of one example, for tasks whose examples need not pass through tf.data.

A task of `Corpus` files (`qwen_jax.data.corpora`) whose preprocessors all stand here is cached without TensorFlow, at
several times the speed; `qwen_jax.data.task_examples` recognizes them, and every other task goes through SeqIO. Both
give the same examples. An example maps names to bytes and arrays.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen_jax.data.corpora import Corpus
from qwen_jax.data.tokenizer import PinnedTokenizer

Example = Mapping[str, Any]
Step = Callable[[Example], Example]
# Examples of the cache, and name to dtype and shape of their features, to the examples after the last steps of a task.
LastSteps = Callable[[Iterator[Example], Mapping[str, Mapping[str, Any]]], Iterator[Example]]


@dataclasses.dataclass(frozen=True)
class Rekey:
    """`seqio.preprocessors.rekey`; `names` are pairs of a new name and the old one, "" for an empty string."""

    names: tuple[tuple[str, str], ...]

    def __call__(self, example: Example) -> Example:
        return {new: example[old] if old else b"" for new, old in self.names}


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """`seqio.preprocessors.tokenize` of the features `names`, without end-of-text."""

    names: tuple[str, ...]
    tokenizer: PinnedTokenizer
    copy_pretokenized: bool

    @functools.cached_property
    def _encode(self):
        return self.tokenizer.load().encode_array

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __call__(self, example: Example) -> Example:
        result = {}
        for name, value in example.items():
            if name in self.names:
                if self.copy_pretokenized:
                    result[f"{name}_pretokenized"] = value
                value = self._encode(value)
            result[name] = value
        return result


@dataclasses.dataclass(frozen=True)
class AppendEos:
    """`seqio.preprocessors.append_eos`; `ids` are pairs of a feature and the id that ends it."""

    ids: tuple[tuple[str, int], ...]

    def __call__(self, example: Example) -> Example:
        present = ((name, example[name], eos) for name, eos in self.ids if name in example)
        ended = {name: np.append(value, value.dtype.type(eos)) for name, value, eos in present}
        return {**example, **ended}


@dataclasses.dataclass(frozen=True)
class CorpusExamples:
    """Examples of one shard of a corpus of files, after `steps`; see `Corpus.shard`."""

    corpus: Corpus
    split: str
    index: int
    count: int
    steps: tuple[Step, ...]

    def __call__(self) -> Iterator[Example]:
        return (apply(self.steps, example) for example in self.corpus.shard(self.split, self.index, self.count))


@dataclasses.dataclass(frozen=True)
class RowSteps:
    """`LastSteps` of one example at a time."""

    steps: tuple[Step, ...]

    def __call__(self, examples: Iterator[Example], features: Mapping[str, Mapping[str, Any]]) -> Iterator[Example]:
        del features  # as the examples are
        return (apply(self.steps, example) for example in examples)


def apply(steps: tuple[Step, ...], example: Example) -> Example:
    """The example after all steps."""
    for step in steps:
        example = step(example)
    return example
