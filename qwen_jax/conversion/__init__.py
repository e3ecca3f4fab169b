"""Checkpoints between our run folders and the formats that others read, exact in both directions.

`load_pretrained` gives the model and the parameters of a run folder or of a Hugging Face folder, `load_tokenizer` its
tokenizer; `convert` writes one as the other (`tools/convert_checkpoint.py` on the command line).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_jax.conversion.converter import convert
    from qwen_jax.conversion.initial_weights import InitialWeights
    from qwen_jax.conversion.load import (
        check_rows,
        detect_format,
        load_for_decoding,
        load_pretrained,
        load_tokenizer,
        read_model_config,
    )

__all__ = [
    "InitialWeights",
    "check_rows",
    "convert",
    "detect_format",
    "load_for_decoding",
    "load_pretrained",
    "load_tokenizer",
    "read_model_config",
]
_FILES = {"InitialWeights": "initial_weights", "convert": "converter"}


def __getattr__(name: str):
    """Imports the file of a name when it is first used: a model that only speaks needs no writer of other formats."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, 'load')}"), name)
