"""Image encoder, resampler and multimodal model of Qwen-VL (arXiv 2308.12966)."""
