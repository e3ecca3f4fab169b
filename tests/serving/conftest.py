"""A vocabulary, and clients."""

import pytest

from qwen_jax.data.tokenizer import Tokenizer, write_ranks


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Single bytes, and a few tokens of several bytes, some of which end inside of a character."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b" a", b"\nA", b"ct", "你".encode()[:2], b"ion"]
    path = tmp_path_factory.mktemp("vocabulary") / "small.tiktoken"
    write_ranks({token: rank for rank, token in enumerate(tokens)}, path)
    return Tokenizer(path)
