"""What a run says of its steps: rows of metrics, figures beside the progress bar."""

import math
import time

import jax

from qwen_jax.training.batches import Prefetcher
from qwen_jax.training.loop_config import LoopConfig
from qwen_jax.training.metrics import MetricsWriter


class TrainingDiverged(FloatingPointError):
    """The loss is not finite."""


class Reporter:
    """Turns the metrics of steps into rows, and keeps the pace between two of them."""

    def __init__(self, writer: MetricsWriter, prefetcher: Prefetcher, loop: LoopConfig):
        self._writer, self._prefetcher, self._loop = writer, prefetcher, loop
        self.latest: dict[str, float] = {}
        self._restart_clock()

    def _restart_clock(self):
        self._since, self._steps, self._waited = time.perf_counter(), 0, self._prefetcher.waited

    def training(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            self._writer.write(step, values)
            raise TrainingDiverged(
                f"the loss of step {step} is {values['loss']}: lower PEAK_LEARNING_RATE or lengthen WARMUP_STEPS, and "
                f"start again from an earlier checkpoint"
            )
        self._steps += 1
        shown = None
        if step % self._loop.log_every == 0 or step == self._loop.train_steps:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            values["tokens_per_second"] = (
                self._steps * self._loop.batch_size * self._loop.sequence_length / seconds
            )
            values["data_wait"] = (self._prefetcher.waited - self._waited) / seconds
            self._writer.write(step, values)
            self._restart_clock()
            self.latest.update(values)
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_second']:,.0f}"}
        self._writer.progress(step, shown)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._writer.write(step, values)
        self.latest.update(values)
        self._writer.say(
            f"step {step}: held-out loss {values['eval/loss']:.4f}, perplexity {values['eval/perplexity']:.2f}, "
            f"{values['eval/bits_per_byte']:.4f} bits per byte"
        )
        self._restart_clock()
