"""Comparison of two checkpoints, for `--check`: their logits on the same tokens, computed one layer at a time.

Both sides run through our decoder in float32, so the comparison shows whether two folders of any formats hold the same
function. The tests and docs/how_to/serving.md show that other software computes the same from a folder.
"""

import dataclasses
import os
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from qwen_jax.conversion.load import open_weights
from qwen_jax.conversion.mapping import LAYER_PREFIX, Weights, float32_copy, parameter_shapes
from qwen_jax.models.decoding import norm_with, single_blocks
from qwen_jax.models.kernels import causal_mask
from qwen_jax.models.log_probs import output_logits
from qwen_jax.models.transformer import decoder_states

# Columns of the output projection that are multiplied at a time.
VOCABULARY_BLOCK = 16384
# Float32 products of the same numbers, relative to the largest logit.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences between the logits of two checkpoints.

    Attributes:
      largest: largest absolute difference.
      scale: largest magnitude of the first's logits.
      positions, agreeing: number of compared positions, and of those at which the most likely token is the same.
      scores: whether the numbers are the scores of reward models, which have no most likely token.
    """

    largest: float
    scale: float
    positions: int
    agreeing: int
    scores: bool = False

    @property
    def same(self) -> bool:
        """Whether the difference is within the error of float32 arithmetic."""
        return self.largest <= TOLERANCE * self.scale

    def __str__(self) -> str:
        if self.scores:
            return (
                f"scores differ by {self.largest:.3g} at most (their scale is {self.scale:.3g}) at {self.positions} "
                f"positions"
            )
        return (
            f"logits differ by {self.largest:.3g} at most (their scale is {self.scale:.3g}); the most likely token is "
            f"the same at {self.agreeing} of {self.positions} positions"
        )


def streamed_logits(weights: Weights, tokens: np.ndarray, progress: bool = False) -> np.ndarray:
    """Logits of the training-mode forward pass; holds one layer, and one side of the vocabulary, at a time.

    Args:
      tokens: int [batch, length].

    Returns:
      float32 [batch, length, vocab_size]; of a reward model its scores, [batch, length, 1].
    """
    config = dataclasses.replace(weights.config, dtype="float32", attention_kernel="xla")
    hidden, _ = decoder_states(
        config,
        jnp.asarray(weights.read("token_embedding", None)[tokens], jnp.float32),
        single_blocks(config, _layers(weights, progress)),
        norm_with(config, {"scale": float32_copy(weights.read("final_norm/scale", None))}),
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        mask=causal_mask(tokens.shape[1], None),
    )
    if config.head == "scalar":
        kernel = weights.read("score", None)
    else:
        kernel = weights.read("token_embedding", None).T if config.tie_embeddings else weights.read("output", None)
    logits = np.empty((*tokens.shape, kernel.shape[1]), np.float32)
    for start in range(0, kernel.shape[1], VOCABULARY_BLOCK):
        part = slice(start, start + VOCABULARY_BLOCK)
        logits[..., part] = output_logits(hidden, jnp.asarray(float32_copy(kernel[:, part])))
    return logits


def _layers(weights: Weights, progress: bool) -> Iterator[dict]:
    """Parameters of each block in float32, read one block at a time."""
    stacked = [path for path in parameter_shapes(weights.config) if path.startswith(LAYER_PREFIX)]
    for layer in tqdm(range(weights.config.num_layers), desc="layers", disable=not progress):
        own = {path.removeprefix(LAYER_PREFIX): float32_copy(weights.read(path, layer)) for path in stacked}
        yield unflatten_dict(own, sep="/")


def compare_logits(
    first: str | os.PathLike,
    second: str | os.PathLike,
    progress: bool = False,
    base: str | os.PathLike | None = None,
) -> Comparison:
    """Compares two folders in any formats on two rows of 64 random tokens, or of the training length if that is less.

    LoRA adapters are computed as they are, not merged; `base` is the base model of one of peft.

    Tokens belong to the smaller vocabulary. Logits of rows that only one side has (see padding.py) do not count.

    Raises:
      FileNotFoundError, ValueError: see `open_weights`; or the logits of a side are not finite, or one side alone is a
        reward model.
    """
    sides = [open_weights(first, base=base), open_weights(second, base=base)]
    heads = [weights.config.head for weights in sides]
    if heads[0] != heads[1]:
        raise ValueError(f"{first} has the head {heads[0]!r} and {second} the head {heads[1]!r}: nothing to compare")
    rows = min(weights.config.vocab_size for weights in sides)
    length = min(64, *(weights.config.context_length for weights in sides))
    tokens = np.random.default_rng(0).integers(0, rows, (2, length))
    found = []
    for folder, weights in zip((first, second), sides, strict=True):
        found.append(streamed_logits(weights, tokens, progress)[..., :rows])
        if not np.isfinite(found[-1]).all():
            raise ValueError(f"the logits of {folder} are not finite: its weights are damaged")
    return Comparison(
        largest=float(np.abs(found[0] - found[1]).max()),
        scale=float(np.abs(found[0]).max()),
        positions=tokens.size,
        agreeing=int((found[0].argmax(-1) == found[1].argmax(-1)).sum()),
        scores=heads[0] == "scalar",
    )
