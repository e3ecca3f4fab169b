"""The loop: batches in, updates, metrics, evaluation and checkpoints out. Every objective runs through it."""

import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.checkpoints.arrays import restore_params
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.checkpoints.rewind import skipped_spans
from qwen_jax.checkpoints.run_folder import CheckpointError, check_same_model
from qwen_jax.distributed import hosts
from qwen_jax.distributed.preemption import PreemptionHandler
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.models.kernels import resolve_kernel
from qwen_jax.models.transformer import Qwen
from qwen_jax.training.batches import Examples, Prefetcher, global_batch
from qwen_jax.training.goodput import Goodput
from qwen_jax.training.metrics import MetricsWriter, NoMetrics
from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
from qwen_jax.training.parameter_groups import split_params
from qwen_jax.training.profiling import CompilationCache, Trace, explain_out_of_memory
from qwen_jax.training.program import compile_run
from qwen_jax.training.reporting import Reporter
from qwen_jax.training.state import TrainState, abstract_state, initial_state, state_from, trees_of
from qwen_jax.training.step import batch_shapes, compile_eval_step
from qwen_jax.training.trainer_config import TrainerConfig


class Trainer:
    """One run: compiled steps, state and data position."""

    def __init__(
        self,
        model: Qwen,
        objective,
        optimizer: OptimizerConfig,
        loop: TrainerConfig,
        mesh: Mesh,
        train_set: Examples,
        eval_set: Examples | None,
        output_dir: str | Path,
        initial_checkpoint: str | Path | None = None,
        *,
        activity: Activity | None = None,
        goodput: Goodput | None = None,
        cache: CompilationCache = CompilationCache(None),
        compiler_options: dict | None = None,
    ):
        """Compiles, then restores the run in `output_dir` or starts one.

        Args:
          initial_checkpoint: a run folder whose weights a new run starts from, instead of random ones.
          activity: what a watchdog looks at.
          goodput: the account of the run's time, begun by the caller.
          cache: where compiled programs are looked for first.
          compiler_options: XLA's for the train step.

        Raises:
          ValueError: batch, mesh or model do not divide, or a process that there is not shall be traced.
          OutOfMemory: the devices have too little.
          CheckpointError: the folder holds another run, or nothing in it can be read.
        """
        self.model, self.loop, self.mesh, self.output_dir = model, loop, mesh, Path(output_dir)
        self.train_set, self.eval_set = train_set, eval_set if loop.eval_batches else None
        self._activity, self._optimizer = activity or Activity(), optimizer
        self._goodput = goodput or Goodput(output_dir)
        self._goodput.count("starting")
        if loop.trace_steps is not None and loop.trace_process >= hosts.process_count():
            raise ValueError(
                f"TrainerConfig.trace_process {loop.trace_process} is none of this job's "
                f"{hosts.process_count()} process(es)"
            )
        self._shapes = batch_shapes(mesh, loop.batch_size, loop.sequence_length, columns=train_set.columns)
        transform = make_optimizer(optimizer, loop.train_steps)
        self._abstract = abstract_state(model, transform, mesh, optimizer.groups)
        packed = "segment_ids" in train_set.columns
        self.kernel = resolve_kernel(model.config, loop.sequence_length, mesh, packed=packed)
        self._compile(objective, cache, compiler_options)
        self._skipped = skipped_spans(self.output_dir)
        self.checkpoints = Checkpoints(output_dir, loop.keep_checkpoints, loop.keep_every)
        self._activity.now("restoring the state")
        with explain_out_of_memory("restoring the state", self.output_dir, self._abstract):
            self.state, self.next_example = self._restore_or_start(transform, initial_checkpoint)
        self.start_step = int(self.state.step)
        self._goodput.count("restoring")
        self._goodput.resumed(self.start_step)

    def _compile(self, objective, cache: CompilationCache, compiler_options: dict | None) -> None:
        loop, began = self.loop, time.perf_counter()
        self._activity.now("compiling the train step")
        with (
            explain_out_of_memory("compiling the train step", self.output_dir, self._abstract),
            cache.compiling() as found,
        ):
            self._train_step = compile_run(
                self.model,
                objective,
                self._optimizer,
                loop.train_steps,
                self.mesh,
                batch_size=loop.batch_size,
                sequence_length=loop.sequence_length,
                accumulation=loop.accumulation(self.mesh),
                seed=loop.seed,
                columns=self.train_set.columns,
                compiler_options=compiler_options,
            )
            if self.eval_set is not None:
                self._eval_step = compile_eval_step(
                    self.model,
                    objective,
                    self._abstract.all_params,
                    self._shapes,
                    self.mesh,
                    loop.accumulation(self.mesh),
                )
        kept = f"; {found['hits']} program(s) found in {cache.folder}, {found['misses']} put there"
        hosts.log_on_main(
            "compiled in %.1f s%s; a batch is computed in %d part(s)",
            time.perf_counter() - began,
            kept if cache.folder else "",
            loop.accumulation(self.mesh),
        )
        self._goodput.count("compiling")

    def _restore_or_start(self, transform, initial_checkpoint) -> tuple[TrainState, int]:
        abstract = trees_of(self._abstract)
        restored = self.checkpoints.restore_latest(abstract)
        if restored is not None:
            step, trees, metadata = restored
            counter = jax.device_put(np.int32(step), self._abstract.step.sharding)
            state = state_from(counter, trees)
            if metadata["fingerprints"] != {"train": self.train_set.fingerprint}:
                raise CheckpointError(
                    f"{self.output_dir} was trained on other data (another corpus, vocabulary, mixture, seed or "
                    f"sequence length), so its data position means nothing here. Restore the data, or start a new "
                    f"OUTPUT_DIR with INITIAL_CHECKPOINT={self.output_dir}"
                )
            next_example = metadata["positions"]["train"]
            hosts.log_on_main("resuming %s after step %d, example %d", self.output_dir, int(state.step), next_example)
            return state, next_example
        groups = self._optimizer.groups
        state = initial_state(self.model, transform, self.mesh, self.loop.seed, groups)
        if initial_checkpoint is not None:
            check_same_model(initial_checkpoint, self.model.config)
            params, frozen = split_params(restore_params(initial_checkpoint, self._abstract.all_params), groups)
            state = state.replace(params=params, frozen=frozen)
            hosts.log_on_main("starting from the weights of %s", initial_checkpoint)
        return state, 0

    def evaluate(self) -> dict[str, float]:
        """Mean loss in nats per token, perplexity and bits per UTF-8 byte on the held-out set."""
        sums: dict[str, float] = {}
        batches = min(self.loop.eval_batches, math.ceil(len(self.eval_set) / self.loop.batch_size))
        for index in range(batches):
            self._activity.now(f"evaluating, batch {index + 1} of {batches}")
            batch = global_batch(self.eval_set, index * self.loop.batch_size, self._shapes)
            for name, value in jax.device_get(self._eval_step(self.state.all_params, batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        loss = sums["loss"] / max(sums["weight"], 1.0)
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": loss / math.log(2) / self.eval_set.bytes_per_token,
        }

    def _save(self, step: int) -> None:
        self._activity.now("saving a checkpoint", step, together=True)
        self.checkpoints.save(
            step,
            trees_of(self.state),
            {
                "positions": {"train": self.next_example},
                "fingerprints": {"train": self.train_set.fingerprint},
                "skipped_examples": {"train": [list(span) for span in self._skipped]},
            },
        )

    def run(self) -> dict[str, float]:
        """Trains to the last step, or until SIGTERM; saves at the end of either.

        Returns:
          The last metrics, with "step".

        Raises:
          TrainingDiverged: the loss or the gradient became infinite or NaN; nothing is saved after that.
          OutOfMemory: a step needs more memory than the devices have.
        """
        first = hosts.process_index() == 0
        writer = MetricsWriter(self.output_dir, self.start_step, self.loop.train_steps) if first else NoMetrics()
        writer.describe(
            self.start_step,
            {
                "attention": self.kernel,
                "mesh": dict(self.mesh.shape),
                "processes": hosts.process_count(),
                "device": self.mesh.devices.flat[0].device_kind,
            },
        )
        prefetcher = Prefetcher(self.train_set, self._shapes, self.next_example, self._skipped)
        steps = self.loop.trace_steps if hosts.process_index() == self.loop.trace_process else None
        trace = Trace(steps, self.output_dir, self.loop.trace_process)
        try:
            with PreemptionHandler() as stop, explain_out_of_memory("training", self.output_dir, self._abstract):
                result = self._loop(writer, prefetcher, stop, trace)
        except BaseException:
            # In a job, a save in the background may wait for a process that is lost: then it is left behind.
            if hosts.process_count() == 1:
                self.checkpoints.close()
            raise
        finally:
            trace.close()
            prefetcher.close()
            writer.close()
        self.checkpoints.close()
        return result

    def _loop(self, writer, prefetcher: Prefetcher, stop: PreemptionHandler, trace: Trace) -> dict[str, float]:
        loop, step, count = self.loop, self.start_step, self._goodput.count
        report = Reporter(writer, prefetcher, loop, self._goodput, self._optimizer.skip.most_in_a_row)
        if step == 0 and self.eval_set is not None:
            report.evaluation(0, self.evaluate())
            count("evaluation")
        pending = None
        while step < loop.train_steps and not stop.should_stop(step):
            batch = self._next_batch(prefetcher, step, pending)
            self._activity.now("computing", step, together=True)
            trace.before(step + 1)
            with trace.around(step + 1):
                self.state, metrics = self._train_step(self.state, batch)
            step += 1
            if trace.after(step, metrics):
                writer.say(f"trace of steps {loop.trace_steps[0]} to {loop.trace_steps[1]} in {trace.folder}")
            self.next_example = prefetcher.position
            # The step before is read while this one computes: the host never holds the devices up.
            if pending is not None:
                report.training(*pending)
            pending = (step, metrics)
            last = step == loop.train_steps
            evaluates = self.eval_set is not None and (last or (loop.eval_every and step % loop.eval_every == 0))
            saves = last or step % loop.checkpoint_every == 0
            if evaluates or saves:
                report.training(*pending)
                pending = None
                count("steps")
            if evaluates:
                report.evaluation(step, self.evaluate())
                count("evaluation")
            if saves:
                self._save(step)
                count("checkpoints")
        if pending is not None:
            report.training(*pending)
            count("steps")
        self._finish(writer, step, report, stopped=step < loop.train_steps)
        return {"step": step, **report.latest}

    def _next_batch(self, prefetcher: Prefetcher, step: int, pending) -> dict[str, jax.Array]:
        self._goodput.count("steps")
        self._activity.now(f"reading the batch of step {step + 1}", step)
        batch = prefetcher.next()
        # Nothing was lost while the devices still computed the step before.
        busy = pending is not None and not pending[1]["loss"].is_ready()
        self._goodput.count("steps" if busy else "data")
        return batch

    def _finish(self, writer, step: int, report: Reporter, stopped: bool) -> None:
        self._save(step)
        self.checkpoints.wait()
        self._goodput.count("checkpoints")
        report.end(step)
        if stopped:
            writer.say(f"stopped by SIGTERM after step {step}, saved in {self.output_dir}; the same command goes on")
        writer.say(str(self._goodput))
