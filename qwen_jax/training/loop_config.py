"""Lengths and intervals of a run."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Lengths and intervals of a run, in updates (steps) and sequences.

    Attributes:
      train_steps: updates in all.
      batch_size: sequences of one update, over all devices and accumulation steps.
      sequence_length: tokens of one sequence.
      accumulation_steps: parts that a batch is computed in, one after the other.
      seed: of parameters and dropout.
      log_every, eval_every, checkpoint_every: intervals; 0 for eval_every means only at start and end.
      eval_batches: at most so many batches of the held-out set are used.
      keep_checkpoints: how many of the newest are kept.
    """

    train_steps: int
    batch_size: int
    sequence_length: int
    accumulation_steps: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("seed", "eval_every", "eval_batches") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"LoopConfig.{field.name} must be an integer of at least {least}, found {value!r}")
