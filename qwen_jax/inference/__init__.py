"""Decoding with a key-value cache, and sampling."""
