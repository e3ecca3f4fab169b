"""Evaluation: benchmarks (report 2.5, A.2.1), perplexity, and how people rank answers of chat models (3.3, A.2.2)."""
