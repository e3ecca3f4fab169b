"""Run folders: what lies in one, how checkpoints are written and read, and how a run goes back to one."""
