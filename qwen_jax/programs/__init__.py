"""Compiled programs, read as text: what one device computes, moves and waits for. Knows no model and no gin file."""
