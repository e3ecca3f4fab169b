"""The inference-mode forward pass, and the engine that generates continuations of many prompts at once."""

from qwen_jax.inference.engine import Engine
from qwen_jax.inference.forward import logits
from qwen_jax.inference.requests import Handle, Request, Result, Score, StreamChunk
from qwen_jax.inference.sampling import SamplingConfig

__all__ = ["Engine", "Handle", "Request", "Result", "SamplingConfig", "Score", "StreamChunk", "logits"]
