"""What a continuation may be: rules that know, after each token, which tokens may come next."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

BITS = 32  # tokens of a word of a mask


class ConstraintFailed(Exception):
    """A constraint cannot say any more what may come next; the message says why."""


class Matcher(Protocol):
    """One continuation under a constraint, token by token."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: uint32 [words], bit i of word w for token `32 * w + i`; at least one may.

        Raises:
          ConstraintFailed: it cannot be known.
        """
        ...

    def advance(self, token: int) -> None:
        """Goes on after `token`, one that may come."""
        ...


class Constraint(Protocol):
    """A language of continuations, such as the JSON of a schema. Where one of them is whole, an end token may come.

    Attributes:
      end_ids: the tokens that end a continuation; none of them may come elsewhere.
    """

    end_ids: tuple[int, ...]

    def start(self) -> Matcher:
        """A continuation that has no token yet."""
        ...


@dataclasses.dataclass(frozen=True)
class FreeText:
    """Any text between two given ones.

    Attributes:
      before: text before it; may be empty.
      without: what the text does not have.
      after: text that ends it, and that it does not have.
    """

    before: str
    without: tuple[str, ...]
    after: str


@dataclasses.dataclass(frozen=True)
class Way:
    """One way in which a continuation may go.

    Attributes:
      before: text before the JSON.
      schema: of the JSON.
      free: what stands before `before`; None: nothing.
    """

    before: str
    schema: Mapping[str, Any]
    free: FreeText | None = None


def words(vocab_size: int) -> int:
    """Number of words of a mask of so many tokens."""
    return -(-vocab_size // BITS)
