"""The decoder of report 2.3.1 in Flax Linen. Knows no data, no optimizer and no outside weight format."""
