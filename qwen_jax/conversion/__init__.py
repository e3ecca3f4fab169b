"""Checkpoints between our run folders and the formats that others read, exact in both directions.

`load_pretrained` gives the model and the parameters of a run folder or of a Hugging Face folder, `load_tokenizer` its
tokenizer; `convert` writes one as the other (`tools/convert_checkpoint.py` on the command line).
"""

from qwen_jax.conversion.converter import convert
from qwen_jax.conversion.initial_weights import InitialWeights
from qwen_jax.conversion.load import check_rows, detect_format, load_pretrained, load_tokenizer, read_model_config

__all__ = [
    "InitialWeights",
    "check_rows",
    "convert",
    "detect_format",
    "load_pretrained",
    "load_tokenizer",
    "read_model_config",
]
