"""The vocabulary that gin configures, without SeqIO: `vocabulary_path.path = "small.tiktoken"` in a gin file."""

import gin

from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.files import PathLike, as_path


@gin.configurable
def vocabulary_path(path: PathLike | None = None) -> str | None:
    """The `.tiktoken` file of runs, and of tasks without one of their own; None is the released vocabulary."""
    return None if path is None else str(as_path(path, "VOCABULARY"))


def default_tokenizer() -> Tokenizer:
    """The tokenizer of `vocabulary_path`.

    Raises:
        FileNotFoundError, ValueError: see `Tokenizer`.
    """
    return Tokenizer(vocabulary_path())
