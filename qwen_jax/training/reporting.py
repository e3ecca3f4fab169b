"""What a run says of its steps: rows of metrics, figures beside the progress bar, which host holds up the others."""

import math
import statistics
import time

import jax

from qwen_jax.distributed import hosts
from qwen_jax.training.batches import Prefetcher
from qwen_jax.training.goodput import Goodput
from qwen_jax.training.metrics import MetricsWriter, NoMetrics
from qwen_jax.training.trainer_config import TrainerConfig


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient is not finite, or too many updates were skipped."""


def host_statistics(paces: dict[int, dict[str, float]]) -> dict[str, float]:
    """Least, median and largest of what the processes of a job measured, and which process is the slowest.

    Args:
      paces: process to its "step", "data_wait" and "busy": seconds a step from start to start, waiting for a batch, and
        not waiting for devices. Steps take equally long in all, for every step waits for all; the process that the
        others wait for is the one that waits for nobody, so the largest "busy" or "data_wait" names it.

    Returns:
      `hosts/NAME_min`, `_median`, `_max` and `hosts/NAME_slowest`, the number of the process with the largest.
    """
    found = {}
    for name in next(iter(paces.values())):
        values = {process: pace[name] for process, pace in paces.items()}
        found[f"hosts/{name}_min"] = min(values.values())
        found[f"hosts/{name}_median"] = statistics.median(values.values())
        found[f"hosts/{name}_max"] = max(values.values())
        found[f"hosts/{name}_slowest"] = max(values, key=values.get)
    return found


class Reporter:
    """Turns the metrics of steps into rows, and keeps the pace between two of them."""

    def __init__(
        self,
        writer: MetricsWriter | NoMetrics,
        prefetcher: Prefetcher,
        loop: TrainerConfig,
        goodput: Goodput,
        most_skipped: int,
    ):
        """Starts the clock.

        Args:
          most_skipped: updates left out in a row that end the run.
        """
        self._writer, self._prefetcher, self._loop, self._goodput = writer, prefetcher, loop, goodput
        self._most_skipped = most_skipped
        self._process, self._processes = hosts.process_index(), hosts.process_count()
        self.latest: dict[str, float] = {}
        self._restart_clock()

    def _restart_clock(self):
        self._since, self._steps, self._waited = time.perf_counter(), 0, self._prefetcher.waited
        self._device_wait = 0.0

    def training(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the metrics of a step, waiting for it, and writes a row where one is due.

        Raises:
          TrainingDiverged: the loss or the gradient is not finite and the update was made, or too many were skipped.
        """
        began = time.perf_counter()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._device_wait += time.perf_counter() - began
        self._check(step, values)
        self._steps += 1
        shown = None
        if step % self._loop.log_every == 0 or step == self._loop.train_steps:
            self._add_pace(values)
            self.end(step)
            values["goodput"] = self._goodput.shares()["steps"]
            self._writer.write(step, values)
            self._restart_clock()
            self.latest.update(values)
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_second']:,.0f}"}
        self._writer.progress(step, shown)

    def end(self, step: int) -> None:
        """Saves the account of the run's time after `step`."""
        if self._process == 0:
            self._goodput.write(step)

    def _check(self, step: int, values: dict[str, float]) -> None:
        in_a_row = values.get("skipped_in_a_row", 0)
        # A gradient alone may be NaN: the parameters are then, and the next loss would come too late for a checkpoint.
        wrong = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        lost = wrong and not in_a_row
        if not lost and in_a_row < self._most_skipped:
            return
        self._writer.write(step, values)
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
        seconds = max(time.perf_counter() - self._since, 1e-9)
        waited = self._prefetcher.waited - self._waited
        values["tokens_per_second"] = self._steps * self._loop.batch_size * self._loop.sequence_length / seconds
        values["data_wait"] = waited / seconds
        if self._processes == 1:
            return
        pace = {"step": seconds, "data_wait": waited, "busy": seconds - self._device_wait}
        hosts.put(f"pace/{self._process}", {name: value / self._steps for name, value in pace.items()})
        if self._process == 0:
            # What the others last put there, which may be their row before: nobody waits for anybody here.
            values.update(host_statistics(hosts.peek_all("pace")))

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes a row of a held-out loss."""
        self._writer.write(step, values)
        self.latest.update(values)
        self._writer.say(
            f"step {step}: held-out loss {values['eval/loss']:.4f}, perplexity {values['eval/perplexity']:.2f}, "
            f"{values['eval/bits_per_byte']:.4f} bits per byte"
        )
        self._restart_clock()
