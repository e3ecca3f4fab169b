"""qwen_jax: the Qwen technical report (2023) as training code in JAX."""
