"""Sampling of sources: up-sampling of good ones (report section 2.1), and down-sampling."""

import hashlib


def copies(document_id: str, weight: float, seed: int = 0) -> int:
    """Number of times that a document is written: a function of its id, the weight and the seed.

    The whole part of the weight, and one more for a share of documents equal to its fraction: on average `weight`.

    Raises:
        ValueError: the weight is negative or no number.
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"a weight of a source is {weight}, expected a number of at least 0")
    whole = int(weight)
    return whole + (uniform(document_id, f"copies:{seed}") < weight - whole)


def uniform(document_id: str, purpose: str) -> float:
    """A number in [0, 1) from a hash, equal on every machine and at every call."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=purpose.encode()[:64]).digest()
    return int.from_bytes(digest, "little") / 2**64
