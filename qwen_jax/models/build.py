"""The model of a configuration."""

import flax.linen as nn
import jax

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.models.vision.qwen_vl import QwenVL


def build_model(config: ModelConfig) -> Qwen:
    """A decoder, with an image encoder where `config.vision` is set."""
    return Qwen(config) if config.vision is None else QwenVL(config)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(abstract_params(build_model(config)))))
