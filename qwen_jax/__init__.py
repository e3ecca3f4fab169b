"""qwen_jax: the Qwen technical report (2023) as training code in JAX."""

import os

# TensorFlow (under SeqIO) otherwise greets every command with lines about oneDNN and CUDA.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
