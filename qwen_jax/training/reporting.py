"""Reports of the steps of a run: rows of metrics, figures beside the progress bar, and the slowest host."""

import math
import statistics
import time

import jax

from qwen_jax.distributed import hosts
from qwen_jax.training.callbacks import Callback
from qwen_jax.training.metrics import MetricsWriter


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient is not finite, or too many updates were skipped."""


def host_statistics(paces: dict[int, dict[str, float]]) -> dict[str, float]:
    """Least, median and largest of the measurements of all processes, and the slowest process.

    Args:
      paces: process to its "step", "data_wait" and "busy": seconds a step from start to start, waiting for a batch, and
        not waiting for devices. Every step waits for all processes, so steps take equally long in all of them; the
        slowest process waits for no other, and has the largest "busy" or "data_wait".

    Returns:
      `hosts/NAME_min`, `_median`, `_max` and `hosts/NAME_slowest`, the number of the process with the largest.
    """
    found = {}
    for name in next(iter(paces.values())):
        values = {process: pace[name] for process, pace in paces.items()}
        found[f"hosts/{name}_min"] = min(values.values())
        found[f"hosts/{name}_median"] = statistics.median(values.values())
        found[f"hosts/{name}_max"] = max(values.values())
        found[f"hosts/{name}_slowest"] = max(values, key=values.__getitem__)
    return found


class Reporter(Callback):
    """Turns the metrics of steps into rows, keeps the pace between two of them, and ends a run that diverges."""

    def __init__(self, most_skipped: int):
        """Opens nothing yet.

        Args:
          most_skipped: number of consecutive skipped updates that ends the run.
        """
        self._most_skipped = most_skipped
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def begin(self, trainer):
        """Opens the files in process 0, and writes the kernel, the mesh and the devices."""
        self._trainer, self._goodput = trainer, trainer.run_folder.goodput
        self._process, self._processes = hosts.process_index(), hosts.process_count()
        if self._process == 0:
            trainer.writer = MetricsWriter(trainer.run_folder.local, trainer.step, trainer.config.train_steps)
        trainer.writer.describe(
            trainer.step,
            {
                "attention": trainer.kernel,
                "mesh": dict(trainer.mesh.shape),
                "processes": hosts.process_count(),
                "device": trainer.mesh.devices.flat[0].device_kind,
            },
        )
        self._restart_clock()

    def _restart_clock(self):
        self._since, self._steps, self._waited = time.perf_counter(), 0, self._trainer.batches.waited
        self._device_wait = 0.0
        self._counted: dict[str, float] = {}

    def after_step(self, trainer, metrics):
        """Reads the step before, while this one computes: the host never holds the devices up."""
        if self._pending is not None:
            self._report(*self._pending)
        self._pending = (trainer.step, metrics)

    def settle(self, trainer):
        """Reads the last step, waiting for it."""
        if self._pending is not None:
            self._report(*self._pending)
            self._pending = None

    def resume(self, trainer):
        """Leaves the time of callbacks out of the pace."""
        self._restart_clock()

    def end(self, trainer):
        """Saves the account of the run's time, and shows it."""
        self._write_goodput(trainer.step)
        if trainer.step < trainer.config.train_steps:
            trainer.writer.say(
                f"stopped by {trainer.stopped_by} after step {trainer.step}, saved in {trainer.run_folder.folder}; "
                f"the same command goes on"
            )
        trainer.writer.say(str(self._goodput))

    def close(self):
        """Closes the files."""
        self._trainer.writer.close()

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the metrics of a step, waiting for it, and writes a row where one is due.

        Raises:
          TrainingDiverged: the loss or the gradient is not finite and the update was made, or too many were skipped.
        """
        config, writer = self._trainer.config, self._trainer.writer
        began = time.perf_counter()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._device_wait += time.perf_counter() - began
        self._check(step, values)
        self._steps += 1
        for name in self._trainer.objective.counts:
            if name in values:
                self._counted[name] = self._counted.get(name, 0.0) + values[name]
        shown = None
        if step % config.log_every == 0 or step == config.train_steps:
            counted = list(self._counted)
            self._add_pace(values)
            self._write_goodput(step)
            values["goodput"] = self._goodput.shares()["steps"]
            writer.write(step, values)
            self._restart_clock()
            self._trainer.latest.update(values)
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_second']:,.0f}"}
            shown |= {f"{name}/s": f"{values[f'{name}_per_second']:,.1f}" for name in counted}
        writer.progress(step, shown)

    def _write_goodput(self, step: int) -> None:
        if self._process == 0:
            self._goodput.write(step)

    def _check(self, step: int, values: dict[str, float]) -> None:
        in_a_row = values.get("skipped_in_a_row", 0)
        # A gradient alone may be NaN: the parameters are then, and the next loss would come too late for a checkpoint.
        wrong = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        lost = wrong and not in_a_row
        if not lost and in_a_row < self._most_skipped:
            return
        self._trainer.writer.write(step, values)
        what = (
            f"the {wrong[0].replace('_', ' ')} of step {step} is {values[wrong[0]]}"
            if lost
            else (
                f"{in_a_row:.0f} updates in a row were skipped, the last at step {step} with a gradient norm of "
                f"{values['gradient_norm']:g}"
            )
        )
        raise TrainingDiverged(
            f"{what}: lower PEAK_LEARNING_RATE or lengthen WARMUP_STEPS, and start again from an earlier checkpoint "
            f"(tools/rewind.py)"
        )

    def _add_pace(self, values: dict[str, float]) -> None:
        config = self._trainer.config
        seconds = max(time.perf_counter() - self._since, 1e-9)
        waited = self._trainer.batches.waited - self._waited
        values["tokens_per_second"] = self._steps * config.batch_size * config.sequence_length / seconds
        values |= {f"{name}_per_second": count / seconds for name, count in self._counted.items()}
        values["data_wait"] = waited / seconds
        if self._processes == 1:
            return
        pace = {"step": seconds, "data_wait": waited, "busy": seconds - self._device_wait}
        hosts.put(f"pace/{self._process}", {name: value / self._steps for name, value in pace.items()})
        if self._process == 0:
            # The newest values of the other processes, which may be those of their previous row: none waits here.
            values.update(host_statistics(hosts.peek_all("pace")))
