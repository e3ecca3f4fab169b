"""Lengths and intervals of a run."""

import dataclasses
import math

from jax.sharding import Mesh

from qwen_jax.sharding import num_batch_shards


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Lengths and intervals of a run, in updates (steps) and sequences.

    Attributes:
      train_steps: updates in all.
      batch_size: sequences of one update, over all devices and accumulation steps.
      sequence_length: tokens of one sequence.
      accumulation_steps: parts that a batch is computed in, one after the other; None: as few as `tokens_per_device`
        allows.
      tokens_per_device: the largest number of tokens that fit into a device's memory at once; one row is the minimum.
        None: no limit. Not used where accumulation_steps is given.
      seed: of parameters and dropout.
      log_every, eval_every, checkpoint_every: intervals; 0 for eval_every means only at start and end.
      eval_batches: the largest number of batches of the held-out set; 0: no held-out loss.
      keep_checkpoints: how many of the newest are kept.
      keep_every: the checkpoints of multiples of this many steps are kept as well, for rewinds; 0 keeps no others.
      trace_steps: (first, last) step to write an XProf trace of, into the run's folder; None writes none.
      trace_process: the process that writes it.
    """

    train_steps: int
    batch_size: int
    sequence_length: int
    accumulation_steps: int | None = None
    tokens_per_device: int | None = None
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    keep_every: int = 0
    trace_steps: tuple[int, int] | None = None
    trace_process: int = 0

    def __post_init__(self):
        may_be_zero = ("seed", "eval_every", "eval_batches", "keep_every", "trace_process")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in may_be_zero else 1
            if value is None and field.name in ("accumulation_steps", "tokens_per_device"):
                continue
            if field.name != "trace_steps" and (not isinstance(value, int) or value < least):
                raise ValueError(f"TrainerConfig.{field.name} must be an integer of at least {least}, found {value!r}")
        steps = self.trace_steps
        if steps is not None and not (
            isinstance(steps, (tuple, list))
            and len(steps) == 2
            and all(isinstance(step, int) for step in steps)
            and 1 <= steps[0] <= steps[1]
        ):
            raise ValueError(
                f"TrainerConfig.trace_steps must be (FIRST, LAST) with 1 <= FIRST <= LAST, found {steps!r}"
            )

    def within_epochs(self, epochs: float | None, examples: int) -> "TrainerConfig":
        """This configuration with at most as many `train_steps` as `epochs` passes over `examples` rows take.

        The last batch is filled up with rows of the next pass, so that every row is read. None: no limit.

        Raises:
          ValueError: `epochs` is not positive.
        """
        if epochs is None:
            return self
        if not isinstance(epochs, int | float) or not epochs > 0:
            raise ValueError(f"EPOCHS must be a positive number, or None for no limit; found {epochs!r}")
        steps = math.ceil(epochs * examples / self.batch_size)
        return dataclasses.replace(self, train_steps=min(self.train_steps, steps))

    def accumulation(self, mesh: Mesh) -> int:
        """Parts that a batch is computed in on `mesh`: the update is the same for any number, memory is not.

        A batch that does not divide over the mesh is one part; `training.step.batch_shapes` refuses it.
        """
        if self.accumulation_steps is not None:
            return self.accumulation_steps
        rows, rest = divmod(self.batch_size, num_batch_shards(mesh))
        if self.tokens_per_device is None or rest:
            return 1
        tokens = self.batch_size * self.sequence_length / mesh.size
        parts = (n for n in range(1, rows + 1) if rows % n == 0)
        return next((n for n in parts if tokens / n <= self.tokens_per_device), rows)
