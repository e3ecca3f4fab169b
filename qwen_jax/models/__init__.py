"""The decoder of report 2.3.1 in Flax Linen. It imports no data, no optimizer and no external weight format."""
