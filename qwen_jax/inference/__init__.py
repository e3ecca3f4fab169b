"""The inference-mode forward pass, decoding with a key-value cache, and sampling."""

from qwen_jax.inference.forward import logits

__all__ = ["logits"]
