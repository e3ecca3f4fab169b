"""What training asks of a model, and of the weights that a new run starts from."""

from typing import Any, Protocol

import jax
from jax.sharding import Mesh


class Model(Protocol):
    """A model that can be trained; `qwen_jax.models.transformer.Qwen` is one.

    Attributes:
      has_dropout: whether a training pass needs random numbers.
    """

    has_dropout: bool

    def init_params(self, rng: jax.Array) -> dict:
        """Random parameters: a nested dict of float32 arrays, in boxes with the logical names of their axes."""

    def attention(self, length: int | None, packed: bool, mesh: Mesh) -> str:
        """Name of the attention kernel for rows of `length` tokens (None: rows without tokens) on `mesh`.

        Raises:
          ValueError: the configuration asks for a kernel that cannot run there.
        """

    def apply(self, variables: dict, *arguments, **options) -> Any:
        """Computes; only objectives call it."""


class InitialWeights(Protocol):
    """Weights that a new run starts from, whole or for a part of the model."""

    def check(self, abstract: dict) -> None:
        """Finds what is wrong with them, before anything is compiled.

        Args:
          abstract: all parameters of the model: nested dict of ShapeDtypeStructs with shardings.

        Raises:
          CheckpointError: they cannot be read, or do not fit the model.
        """

    def load(self, abstract: dict) -> dict:
        """The weights, placed as `abstract` says: its tree, or a sub-tree; parameters that are missing stay random.

        Raises:
          CheckpointError: as `check`.
        """
