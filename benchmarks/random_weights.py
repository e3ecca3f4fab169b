"""A model of random weights in the format that both sides of a comparison load."""

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion import convert
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.models.config import ModelConfig


def write_model(config: ModelConfig, folder: Path, spread: float) -> Path:
    """Writes `folder`/qwen2 with weights N(0, spread), those of stacked matrices N(0, 0.02), norms about 1.

    Returns:
      That folder.
    """
    random = np.random.default_rng(0)
    flat = {
        path: random.standard_normal(shape, np.float32) * (0.02 if len(shape) > 2 or "output" in path else spread)
        + np.float32("scale" in path)
        for path, shape in parameter_shapes(config).items()
    }
    save_params(folder / "run", config, unflatten_dict(flat, sep="/"), None)
    return convert("orbax", folder / "run", "qwen2", folder / "qwen2", progress=False)
