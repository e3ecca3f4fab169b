"""Corpora, vocabularies, caching, packing and loading: all that happens to text before it is a batch of arrays."""
