"""Protocols of a model that can be trained, and of the initial weights of a run."""

from typing import Any, Protocol

import jax
from jax.sharding import Mesh


class Model(Protocol):
    """A hashable model that can be trained; `qwen_jax.models.transformer.Qwen` is one."""

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass needs random numbers."""
        ...

    def init_params(self, rng: jax.Array) -> dict:
        """Random parameters: a nested dict of float32 arrays, in boxes with the logical names of their axes."""

    def attention(self, length: int | None, packed: bool, mesh: Mesh) -> str:
        """Name of the attention kernel for rows of `length` tokens (None: rows without tokens) on `mesh`.

        Raises:
          ValueError: the configured kernel cannot run there.
        """

    def apply(self, variables: dict, *arguments, **options) -> Any:
        """Computes; only objectives call it."""


class InitialWeights(Protocol):
    """Initial weights of a new run, for the whole model or a part of it."""

    def check(self, abstract: dict) -> None:
        """Checks that the weights fit the model, before anything is compiled.

        Args:
          abstract: all parameters of the model: nested dict of ShapeDtypeStructs with shardings.

        Raises:
          CheckpointError: the weights cannot be read, or do not fit the model.
        """

    def load(self, abstract: dict) -> dict:
        """The weights, placed as `abstract` says: its tree, or a sub-tree; parameters that are missing stay random.

        Raises:
          CheckpointError: as `check`.
        """
