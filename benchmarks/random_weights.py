"""A model of random weights in the format that both sides of a comparison load."""

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion import convert
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.models.config import ModelConfig


def write_model(
    config: ModelConfig, folder: Path, spread: float, tokenizer: Path | None = None, silent: int = 0
) -> Path:
    """Writes a model with weights N(0, spread), those of stacked matrices and heads N(0, 0.02), norms about 1.

    Args:
      config: with a scalar head it becomes a Qwen2ForSequenceClassification, over a vocabulary of single bytes.
      tokenizer: a .tiktoken file that goes with the model.
      silent: how many of the last ids have a logit of 0, so that greedy decoding chooses none of them.

    Returns:
      Its folder: `folder`/qwen2.
    """
    random, reward = np.random.default_rng(0), config.head == "scalar"
    flat = {
        path: random.standard_normal(shape, np.float32)
        * (0.02 if len(shape) > 2 or path in ("output", "score") else spread)
        + np.float32("scale" in path)
        for path, shape in parameter_shapes(config).items()
    }
    if silent:
        flat["output"][:, -silent:] = 0
    folder.mkdir(exist_ok=True)
    vocabulary = tokenizer
    if reward and tokenizer is None:
        vocabulary = folder / "bytes.tiktoken"
        write_ranks({bytes([byte]): byte for byte in range(256)}, vocabulary)
    save_params(folder / "run", config, unflatten_dict(flat, sep="/"), vocabulary)
    target = "qwen2_reward" if reward else "qwen2"
    return convert("orbax", folder / "run", target, folder / "qwen2", progress=False)
