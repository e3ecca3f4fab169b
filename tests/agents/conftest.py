"""Interpreters of the tests."""

import pytest

from qwen_jax.agents.interpreter import Interpreter, Limits
from qwen_jax.sandbox import SandboxUnavailableError

# The snippets of the tests take no time: whatever is interrupted by time does not end by itself.
LIMITS = Limits(timeout_s=60, grace_s=20, text=4000, images=3)


@pytest.fixture(scope="package")
def interpreter():
    """One kernel for all tests that leave it as it is; skips where this system cannot isolate it."""
    with Interpreter(LIMITS) as made:
        try:
            made.start()
        except SandboxUnavailableError as error:
            pytest.skip(str(error))
        yield made
