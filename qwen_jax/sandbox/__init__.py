"""Runs programs that nobody has read, isolated: no network, no files of the host, limits on everything."""

from qwen_jax.sandbox.languages import LANGUAGES, TIMEOUT_S, toolchain
from qwen_jax.sandbox.programs import check, default_sandbox, run
from qwen_jax.sandbox.sandbox import Plan, Process, Result, Sandbox, SandboxUnavailableError, Step

__all__ = [
    "LANGUAGES",
    "TIMEOUT_S",
    "Plan",
    "Process",
    "Result",
    "Sandbox",
    "SandboxUnavailableError",
    "Step",
    "check",
    "default_sandbox",
    "run",
    "toolchain",
]
