"""Run folders: their files, writing and reading of checkpoints, and rewinds to earlier ones."""
