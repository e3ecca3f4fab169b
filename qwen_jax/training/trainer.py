"""The loop: batches in, updates, metrics, evaluation and checkpoints out. Every objective runs through it."""

import concurrent.futures
import dataclasses
import logging
import math
import signal
import threading
import time
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.models.transformer import Qwen
from qwen_jax.training.checkpoints import CheckpointError, Checkpoints, check_same_model
from qwen_jax.training.metrics import MetricsWriter
from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
from qwen_jax.training.program import compile_run
from qwen_jax.training.state import TrainState, abstract_state, initial_state
from qwen_jax.training.step import batch_shapes, compile_eval_step
from qwen_jax.training.weights import restore_params

log = logging.getLogger(__name__)


class TrainingDiverged(FloatingPointError):
    """The loss is not finite."""


class Examples(Protocol):
    """Random access to examples by global index; what `qwen_jax.data.loader` gives.

    columns: int32 columns besides "tokens" and "loss_weights", such as "segment_ids" of packed rows.
    """

    bytes_per_token: float
    fingerprint: str
    repeat: bool
    columns: tuple[str, ...]

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> dict[str, np.ndarray]: ...


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


def global_batch(examples: Examples, start: int, shapes: dict) -> dict[str, jax.Array]:
    """The batch of examples `start`, `start + 1`, … as sharded arrays; each host reads only its own rows.

    Rows past the end of `examples` (only where they do not repeat) are zeros, and carry no loss.
    """
    rows = next(iter(shapes.values())).shape[0]
    stop = start + rows if examples.repeat else min(start + rows, len(examples))
    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name, index):
        first, last, _ = index[0].indices(rows)
        if (first, last) not in read:
            read[first, last] = examples.read(start + first, min(start + last, stop)) if start + first < stop else {}
        values = read[first, last].get(name)
        shape = (last - first, shapes[name].shape[1])
        if values is None or values.shape != shape:
            padded = np.zeros(shape, shapes[name].dtype)
            if values is not None:
                padded[: len(values)] = values
            values = padded
        return values[:, index[1]]

    return {
        name: jax.make_array_from_callback(shape.shape, shape.sharding, lambda index, name=name: part(name, index))
        for name, shape in shapes.items()
    }


class _Prefetcher:
    """Reads the next batches in a thread while the devices compute; counts the time the loop waited for one."""

    def __init__(self, examples: Examples, shapes: dict, next_example: int, depth: int = 2):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._examples, self._shapes, self._next = examples, shapes, next_example
        self._rows = next(iter(shapes.values())).shape[0]
        self._queue = [self._request() for _ in range(depth)]
        self.waited = 0.0

    def _request(self):
        start, self._next = self._next, self._next + self._rows
        return self._pool.submit(global_batch, self._examples, start, self._shapes)

    def next(self) -> dict[str, jax.Array]:
        began = time.perf_counter()
        batch = self._queue.pop(0).result()
        self.waited += time.perf_counter() - began
        self._queue.append(self._request())
        return batch

    def close(self):
        self._pool.shutdown(wait=True, cancel_futures=True)


class _StopRequest:
    """While open, SIGTERM asks for a save and a clean end instead of ending the process."""

    def __enter__(self):
        self.asked = False
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)


class Trainer:
    """One run: compiled steps, state and data position."""

    def __init__(
        self, model: Qwen, objective, optimizer: OptimizerConfig, loop: LoopConfig, mesh: Mesh, train_set: Examples,
        eval_set: Examples | None, output_dir: str | Path, initial_checkpoint: str | Path | None = None,
    ):
        """Compiles, then restores the run in `output_dir` or starts one.

        Args:
          initial_checkpoint: a run folder whose weights a new run starts from, instead of random ones.

        Raises:
          ValueError: batch, mesh or model do not divide.
          CheckpointError: the folder holds another run, or nothing in it can be read.
        """
        self.model, self.loop, self.mesh, self.output_dir = model, loop, mesh, Path(output_dir)
        self.train_set, self.eval_set = train_set, eval_set
        self._shapes = batch_shapes(mesh, loop.batch_size, loop.sequence_length, columns=train_set.columns)
        transform = make_optimizer(optimizer, loop.train_steps)
        abstract = abstract_state(model, transform, mesh)
        began = time.perf_counter()
        self._train_step = compile_run(
            model, objective, optimizer, loop.train_steps, mesh, batch_size=loop.batch_size,
            sequence_length=loop.sequence_length, accumulation=loop.accumulation_steps, seed=loop.seed,
            columns=train_set.columns,
        )
        if eval_set is not None:
            self._eval_step = compile_eval_step(model, objective, abstract.params, self._shapes, mesh)
        log.info("compiled in %.1f s", time.perf_counter() - began)
        self.checkpoints = Checkpoints(output_dir, loop.keep_checkpoints)
        self.state, self.next_example = self._restore_or_start(abstract, transform, initial_checkpoint)
        self.start_step = int(self.state.step)

    def _restore_or_start(self, abstract, transform, initial_checkpoint) -> tuple[TrainState, int]:
        restored = self.checkpoints.restore_latest(abstract)
        if restored is not None:
            state, metadata = restored
            if metadata["data"] != self.train_set.fingerprint:
                raise CheckpointError(
                    f"{self.output_dir} was trained on other data (another corpus, vocabulary, mixture, seed or "
                    f"sequence length), so its data position means nothing here. Restore the data, or start a new "
                    f"OUTPUT_DIR with INITIAL_CHECKPOINT={self.output_dir}"
                )
            next_example = metadata["next_example"]
            log.info("resuming %s after step %d, example %d", self.output_dir, int(state.step), next_example)
            return state, next_example
        state = initial_state(self.model, transform, self.mesh, self.loop.seed)
        if initial_checkpoint is not None:
            check_same_model(initial_checkpoint, self.model.config)
            state = state.replace(params=restore_params(initial_checkpoint, abstract.params))
            log.info("starting from the weights of %s", initial_checkpoint)
        return state, 0

    def evaluate(self) -> dict[str, float]:
        """Mean loss in nats per token, perplexity and bits per UTF-8 byte on the held-out set."""
        sums: dict[str, float] = {}
        batches = min(self.loop.eval_batches, math.ceil(len(self.eval_set) / self.loop.batch_size))
        for index in range(batches):
            batch = global_batch(self.eval_set, index * self.loop.batch_size, self._shapes)
            for name, value in jax.device_get(self._eval_step(self.state.params, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        loss = sums["loss"] / max(sums["weight"], 1.0)
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": loss / math.log(2) / self.eval_set.bytes_per_token,
        }

    def _save(self, step: int) -> None:
        self.checkpoints.save(
            step, self.state, {"next_example": self.next_example, "data": self.train_set.fingerprint}
        )

    def run(self) -> dict[str, float]:
        """Trains to the last step, or until SIGTERM; saves at the end of either.

        Returns:
          The last metrics, with "step".

        Raises:
          TrainingDiverged: the loss became infinite or NaN; nothing is saved after that.
        """
        writer = MetricsWriter(self.output_dir, self.start_step, self.loop.train_steps)
        prefetcher = _Prefetcher(self.train_set, self._shapes, self.next_example)
        try:
            with _StopRequest() as stop:
                return self._loop(writer, prefetcher, stop)
        finally:
            prefetcher.close()
            writer.close()
            self.checkpoints.close()

    def _loop(self, writer: MetricsWriter, prefetcher: _Prefetcher, stop: _StopRequest) -> dict[str, float]:
        loop, step = self.loop, self.start_step
        report = _Reporter(writer, prefetcher, loop)
        if step == 0 and self.eval_set is not None:
            report.evaluation(0, self.evaluate())
        pending = None
        while step < loop.train_steps and not stop.asked:
            self.state, metrics = self._train_step(self.state, prefetcher.next())
            step += 1
            self.next_example += loop.batch_size
            # The step before is read while this one computes: the host never holds the devices up.
            if pending is not None:
                report.training(*pending)
            pending = (step, metrics)
            last = step == loop.train_steps
            if self.eval_set is not None and (last or (loop.eval_every and step % loop.eval_every == 0)):
                report.training(*pending)
                pending = None
                report.evaluation(step, self.evaluate())
            if last or step % loop.checkpoint_every == 0:
                if pending is not None:
                    report.training(*pending)
                    pending = None
                self._save(step)
        if pending is not None:
            report.training(*pending)
        self._save(step)
        self.checkpoints.wait()
        if stop.asked and step < loop.train_steps:
            writer.say(f"stopped by SIGTERM after step {step}, saved in {self.output_dir}; the same command goes on")
        return {"step": step, **report.latest}


class _Reporter:
    """Turns the metrics of steps into rows, and keeps the pace between two of them."""

    def __init__(self, writer: MetricsWriter, prefetcher: _Prefetcher, loop: LoopConfig):
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
