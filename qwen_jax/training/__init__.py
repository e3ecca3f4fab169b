"""Objectives, optimizer, train step, checkpoints and the loop that joins them."""
