"""Models with LoRA adapters read as models without them: each kernel with its adapter's product added to it."""

import dataclasses
from typing import Any

import numpy as np

from qwen_jax.conversion.mapping import Weights
from qwen_jax.models.lora import merged_kernel


class MergedWeights:
    """Weights without adapters, from weights with them; a `Weights` of mapping.py.

    Sums are float32: a writer rounds each kernel once. What is read here is what an exported model computes, which the
    unmerged model in bfloat16 does not (its base kernel is rounded before the adapter is added).
    """

    dtype = "float32"

    def __init__(self, source: Weights):
        self._source, self._lora = source, source.config.lora
        self.config, self.position_limit = dataclasses.replace(source.config, lora=None), source.position_limit

    def read(self, path: str, layer: int | None, dtype: Any = None) -> np.ndarray:
        """See `Weights.read`."""
        module, _, leaf = path.rpartition("/")
        if self._lora is None or leaf != "kernel" or module.rpartition("/")[2] not in self._lora.targets:
            return self._source.read(path, layer, dtype)
        kernel, lora_a, lora_b = (
            self._source.read(f"{module}/{name}", layer) for name in ("kernel", "lora_a", "lora_b")
        )
        return merged_kernel(kernel, lora_a, lora_b, self._lora.scale)


def without_adapters(weights: Weights) -> Weights:
    """The weights merged, if they have adapters."""
    return weights if weights.config.lora is None else MergedWeights(weights)
