"""Vocabularies padded to another number of rows: the released models have 151,936 or 152,064 for 151,851 ids.

Rows past the tokenizer's ids exist so that the vocabulary divides by the devices; no text has such an id.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from qwen_jax.conversion.mapping import Weights
from qwen_jax.data.tokenizer import Tokenizer

# Which axis of each parameter counts the vocabulary.
VOCABULARY_AXES = {"token_embedding": 0, "output": 1}


class RepaddedWeights:
    """The same model with another number of vocabulary rows; a `Weights` of mapping.py.

    New rows repeat the last row, if that is padding too: a trained model has learned never to predict it. Otherwise
    they are zero.
    """

    def __init__(self, source: Weights, vocab_size: int, used: int):
        """`used` is the number of ids of the tokenizer."""
        self._source, self._used = source, used
        self.config = dataclasses.replace(source.config, vocab_size=vocab_size)
        self.dtype, self.position_limit = source.dtype, source.position_limit

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """See `Weights.read`."""
        array = self._source.read(path, layer, dtype)
        if path not in VOCABULARY_AXES:
            return array
        axis, rows = VOCABULARY_AXES[path], self.config.vocab_size
        if rows <= array.shape[axis]:
            return array[:rows] if axis == 0 else array[:, :rows]
        last = np.take(array, [-1], axis)
        if self._used >= array.shape[axis]:
            last = np.zeros_like(last)
        return np.concatenate([array, np.repeat(last, rows - array.shape[axis], axis)], axis)


def repad(source: Weights, vocab_size: int | None, tokenizer: Tokenizer | None, where: str | os.PathLike) -> Weights:
    """`source` with `vocab_size` rows of the vocabulary; None leaves it as it is.

    Args:
      where: name of the source in errors.

    Raises:
      ValueError: `vocab_size` cuts rows that the tokenizer uses, or there is no tokenizer to tell them.
    """
    present = source.config.vocab_size
    if vocab_size is None or vocab_size == present:
        return source
    if tokenizer is None:
        raise ValueError(
            f"{where} has no tokenizer, so which of its {present} vocabulary rows are padding is not known: name its "
            ".tiktoken file to change their number"
        )
    ids = tokenizer.vocab_size if source.config.vision is None else tokenizer.vision_vocab_size
    used = min(ids, present)
    if vocab_size < used:
        raise ValueError(
            f"a vocabulary of {vocab_size} rows would cut ids in use: the tokenizer of {where} has {used}, so choose "
            f"at least that many (the model has {present})"
        )
    return RepaddedWeights(source, vocab_size, ids)
