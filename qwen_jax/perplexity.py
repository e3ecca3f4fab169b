"""Perplexity of a text under a checkpoint, as a score for curation (report section 2.1: language models as filters).

`qwen_jax.curation` imports no model: it takes a `CheckpointPerplexity` as it takes any function from text to number.
"""

import dataclasses
import functools
from pathlib import Path

import gin
import numpy as np

from qwen_jax.conversion import load_for_decoding, load_tokenizer
from qwen_jax.evaluation.perplexity import log_probs
from qwen_jax.files import PathLike, as_path
from qwen_jax.inference import Engine

# Longer texts give no better score.
_LONGEST = 1024


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CheckpointPerplexity:
    """exp of the mean negative log probability of a token, over at most the first `max_tokens` tokens of a text.

    Attributes:
        path: run folder (Orbax), or a folder converted to `qwen` or `qwen2`.
        max_tokens: the first tokens say enough of a page; at most 1024 and the context of the model.
        dtype: compute dtype, "float32" or "bfloat16".
    """

    path: PathLike
    max_tokens: int = 256
    dtype: str = "float32"

    def __call__(self, text: str) -> float:
        """The perplexity; infinite for a text of fewer than two tokens.

        Raises:
            ValueError, OSError: the checkpoint cannot be read, or `max_tokens` is out of range.
        """
        engine = _load(as_path(self.path), self.dtype)
        limit = min(engine.model.config.context_length, _LONGEST)
        if not 2 <= self.max_tokens <= limit:
            raise ValueError(f"CheckpointPerplexity.max_tokens is {self.max_tokens}, expected 2…{limit}")
        # Four bytes a token on average: the tokenizer need not read the whole of a book.
        assert engine.tokenizer is not None  # `_load` gives it one
        ids = engine.tokenizer.encode(text[: 16 * self.max_tokens])[: self.max_tokens]
        if len(ids) < 2:
            return float("inf")
        (found,) = log_probs(engine, [ids])
        return float(np.exp(-found.mean()))


@functools.lru_cache(maxsize=1)
def _load(path: Path, dtype: str) -> Engine:
    tokenizer = load_tokenizer(path)
    return Engine(*load_for_decoding(path, dtype=dtype), tokenizer, slots=1)
