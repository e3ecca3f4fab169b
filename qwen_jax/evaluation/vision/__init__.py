"""Metrics of benchmarks with pictures, as functions of texts and boxes."""
