"""The vocabulary that gin configures, without SeqIO: `vocabulary_path.path = "small.tiktoken"` in a gin file."""

import gin

from qwen_jax.data.tokenizer import Tokenizer


@gin.configurable
def vocabulary_path(path: str | None = None) -> str | None:
    """The `.tiktoken` file of runs and of tasks that name none themselves; None is the released vocabulary."""
    return path


def default_tokenizer() -> Tokenizer:
    """The tokenizer of `vocabulary_path`.

    Raises:
        FileNotFoundError, ValueError: see `Tokenizer`.
    """
    return Tokenizer(vocabulary_path())
