"""Callbacks around the steps of a run: evaluation, checkpoints, traces; `reporting.py` has the rows of metrics."""

import math
from typing import TYPE_CHECKING

import jax

from qwen_jax.distributed import hosts
from qwen_jax.training.batches import Examples, global_batch
from qwen_jax.training.objective import Objective
from qwen_jax.training.run import Run
from qwen_jax.training.step import batch_shapes, compile_eval_step

if TYPE_CHECKING:
    from qwen_jax.training.trainer import Trainer

TRACE_FOLDER = "trace"


class Callback:
    """Hooks that the loop of a `Trainer` calls; each method does nothing by default.

    The trainer's attributes say where the run is: `step` (updates made), `state`, `config`, `run_folder`, `writer`,
    `latest`.
    Methods are called in the order of the callbacks, `end` and `close` in the reverse order. All processes of a job
    call the same ones, so a callback may wait for other processes.
    """

    def compile(self, trainer: "Trainer") -> None:
        """Compiles what the callback computes, before the state is on the devices."""

    def begin(self, trainer: "Trainer") -> None:
        """Runs once the state is on the devices, before the first step of this start."""

    def before_step(self, trainer: "Trainer") -> None:
        """Runs before the trainer requests the batch of the next step."""

    def after_step(self, trainer: "Trainer", metrics: dict[str, jax.Array]) -> None:
        """Runs after a step was dispatched; the devices may still compute its metrics."""

    def due(self, trainer: "Trainer") -> bool:
        """Whether the trainer calls `act` after this step."""
        return False

    def settle(self, trainer: "Trainer") -> None:
        """Accounts for every step so far: some callback acts next, or the run ends."""

    def act(self, trainer: "Trainer") -> None:
        """Does the work that was due."""

    def resume(self, trainer: "Trainer") -> None:
        """Runs after callbacks have acted, before further steps."""

    def end(self, trainer: "Trainer") -> None:
        """Runs after the last step of this start, unless an error ended it."""

    def close(self) -> None:
        """Releases open resources, also after an error."""


class Evaluation(Callback):
    """Measures the objective on held-out examples: before the first step, every `every` steps, and after the last."""

    def __init__(self, examples: Examples, every: int, most_batches: int, objective: Objective | None = None):
        """Chooses the examples and the interval.

        Args:
          every: interval in steps; 0 measures only before the first and after the last step.
          most_batches: the largest number of batches to measure.
          objective: what is measured; None: the objective of the trainer.
        """
        self._examples, self._every, self._most_batches = examples, every, most_batches
        self._given = objective

    def _objective(self, trainer: "Trainer") -> Objective:
        return self._given or trainer.objective

    def compile(self, trainer):
        columns, config = self._examples.columns, trainer.config
        self._shapes = batch_shapes(trainer.mesh, config.batch_size, columns)
        self._step = compile_eval_step(
            trainer.model,
            self._objective(trainer),
            trainer.abstract,
            self._shapes,
            columns,
            trainer.mesh,
            config.accumulation(trainer.mesh),
        )

    def measure(self, trainer: "Trainer") -> dict[str, float]:
        """The metrics of the objective on the held-out examples."""
        sums: dict[str, float] = {}
        size = trainer.config.batch_size
        batches = min(self._most_batches, math.ceil(len(self._examples) / size))
        for index in range(batches):
            trainer.run_folder.activity.now(f"evaluating, batch {index + 1} of {batches}")
            batch = global_batch(self._examples, index * size, self._shapes)
            found = self._step(trainer.state.all_params, trainer.state.extra, batch)
            for name, value in jax.device_get(found).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return self._objective(trainer).evaluate(sums | {"weight": max(sums["weight"], 1.0)}, self._examples)

    def begin(self, trainer):
        if trainer.step == 0:
            self.act(trainer)

    def due(self, trainer):
        last = trainer.step == trainer.config.train_steps
        return last or bool(self._every and trainer.step % self._every == 0)

    def act(self, trainer):
        metrics = self.measure(trainer)
        trainer.write({f"eval/{name}": value for name, value in metrics.items()})
        trainer.writer.say(f"step {trainer.step}: {self._objective(trainer).describe(metrics)}")
        trainer.run_folder.goodput.count("evaluation")


class Saving(Callback):
    """Saves a checkpoint every `every` steps, and at the end of each start of the run."""

    def __init__(self, every: int):
        """Chooses the interval, in steps."""
        self._every = every

    def due(self, trainer):
        return trainer.step == trainer.config.train_steps or trainer.step % self._every == 0

    def act(self, trainer):
        trainer.save()
        trainer.run_folder.goodput.count("checkpoints")

    def end(self, trainer):
        trainer.save()
        trainer.checkpoints.wait()
        trainer.run_folder.goodput.count("checkpoints")


class Trace(Callback):
    """An XProf trace of the steps `first` to `last`, both included, into `trace/process_N` of the run's folder."""

    def __init__(self, steps: tuple[int, int], run: Run, process: int):
        """Chooses the steps and the process of the job that traces them.

        Raises:
          ValueError: the job has no such process.
        """
        if process >= hosts.process_count():
            raise ValueError(
                f"TrainerConfig.trace_process {process} is none of this job's {hosts.process_count()} process(es)"
            )
        self._steps, self._here, self._open = steps, hosts.process_index() == process, False
        # Where it is written, and where it is found: a run in a bucket uploads it.
        self._local, self.folder = (one / TRACE_FOLDER / f"process_{process}" for one in (run.local, run.folder))

    def before_step(self, trainer):
        if self._here and trainer.step + 1 == self._steps[0]:
            jax.profiler.start_trace(self._local)
            self._open = True

    def after_step(self, trainer, metrics):
        if self._open and trainer.step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()
            trainer.writer.say(f"trace of steps {self._steps[0]} to {self._steps[1]} in {self.folder}")

    def close(self):
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
