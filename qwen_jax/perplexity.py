"""Perplexity of a text under a checkpoint, as a score for curation (report section 2.1: language models as filters).

`qwen_jax.curation` imports no model: it takes a `CheckpointPerplexity` as it takes any function from text to number.
"""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.files import PathLike

# Texts are padded to one of these lengths, so that there are few programs to compile.
_LENGTHS = (64, 256, 1024)


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
        tokenizer, score, longest = _load(self.path, self.dtype)
        limit = min(longest, _LENGTHS[-1])
        if not 2 <= self.max_tokens <= limit:
            raise ValueError(f"CheckpointPerplexity.max_tokens is {self.max_tokens}, expected 2…{limit}")
        # Four bytes a token on average: the tokenizer need not read the whole of a book.
        ids = tokenizer.encode(text[: 16 * self.max_tokens])[: self.max_tokens]
        if len(ids) < 2:
            return float("inf")
        length = min(next(one for one in _LENGTHS if one >= len(ids)), longest)
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        return float(np.exp(score(padded, len(ids))))


@functools.lru_cache(maxsize=1)
def _load(path: PathLike, dtype: str):
    tokenizer = load_tokenizer(path)
    model, params = load_pretrained(path, dtype=dtype)

    @jax.jit
    def score(params, tokens, count):
        logits = model.apply({"params": params}, tokens)[0, :-1].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[0, 1:, None], axis=-1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        counted = jnp.arange(losses.shape[0]) < count - 1
        return jnp.where(counted, losses, 0).sum() / (count - 1)

    return tokenizer, functools.partial(score, params), model.config.context_length
