"""The loop: batches in, updates, metrics, evaluation and checkpoints out. Every objective runs through it."""

import logging
import math
import signal
import threading
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from qwen_jax.models.transformer import Qwen
from qwen_jax.training.batches import Examples, Prefetcher, global_batch
from qwen_jax.training.checkpoints import CheckpointError, Checkpoints, check_same_model, restore_params
from qwen_jax.training.loop_config import LoopConfig
from qwen_jax.training.metrics import MetricsWriter
from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
from qwen_jax.training.program import compile_run
from qwen_jax.training.reporting import Reporter
from qwen_jax.training.state import TrainState, abstract_state, initial_state
from qwen_jax.training.step import batch_shapes, compile_eval_step

log = logging.getLogger(__name__)


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
        prefetcher = Prefetcher(self.train_set, self._shapes, self.next_example)
        try:
            with _StopRequest() as stop:
                return self._loop(writer, prefetcher, stop)
        finally:
            prefetcher.close()
            writer.close()
            self.checkpoints.close()

    def _loop(self, writer: MetricsWriter, prefetcher: Prefetcher, stop: _StopRequest) -> dict[str, float]:
        loop, step = self.loop, self.start_step
        report = Reporter(writer, prefetcher, loop)
        if step == 0 and self.eval_set is not None:
            report.evaluation(0, self.evaluate())
        pending = None
        while step < loop.train_steps and not stop.asked:
            self.state, metrics = self._train_step(self.state, prefetcher.next())
            step += 1
            self.next_example = prefetcher.position
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
