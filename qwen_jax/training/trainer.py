"""The loop: batches in, updates out, callbacks around them. Every objective runs through it."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.batch_spec import is_packed, row_length
from qwen_jax.checkpoints.bucket import open_checkpoints
from qwen_jax.checkpoints.run_folder import CheckpointError, saved_steps
from qwen_jax.compilation_cache import CompilationCache
from qwen_jax.distributed import hosts
from qwen_jax.host_memory import return_freed_memory
from qwen_jax.training.batches import Batches, Examples
from qwen_jax.training.callbacks import Callback, Evaluation, Saving, Trace
from qwen_jax.training.metrics import MetricsWriter, NoMetrics
from qwen_jax.training.model import InitialWeights, Model
from qwen_jax.training.objective import Objective
from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
from qwen_jax.training.parameter_groups import overlay_params, split_params
from qwen_jax.training.profiling import explain_out_of_memory
from qwen_jax.training.program import compile_run
from qwen_jax.training.reporting import Reporter
from qwen_jax.training.run import Run
from qwen_jax.training.state import TrainState, abstract_state, initial_state, state_from, trees_of
from qwen_jax.training.trainer_config import TrainerConfig

# How many times --hang_timeout the state may take to be read or written: its size and the storage decide that, and a
# last save that is cut off would be so at each start.
_STORAGE_PATIENCE = 4.0


def standard_callbacks(
    run: Run, config: TrainerConfig, optimizer: OptimizerConfig, eval_set: Examples | None
) -> list[Callback]:
    """Callbacks for metrics, traces, evaluation and checkpoints, as configured.

    Raises:
      ValueError: the job has no process of the number `trace_process`.
    """
    callbacks: list[Callback] = [Reporter(optimizer.skip.most_in_a_row)]
    if config.trace_steps is not None:
        callbacks.append(Trace(config.trace_steps, run, config.trace_process))
    if eval_set is not None and config.eval_batches:
        callbacks.append(Evaluation(eval_set, config.eval_every, config.eval_batches))
    return [*callbacks, Saving(config.checkpoint_every)]


class Trainer:
    """One start of a run: compiled step, state and data positions.

    Attributes:
      run_folder: the open run.
      model, objective, config, mesh, batches: the arguments.
      abstract: shapes, dtypes and shardings of the state.
      kernel: name of the attention kernel.
      state: the TrainState; there after `prepare`.
      positions: of the data streams, where a run that resumes from `state` begins.
      step: updates made.
      start_step: updates that earlier starts had made.
      checkpoints: those of the run; there after `prepare`.
      writer: writes the metrics; discards them until a callback opens a file, and where another process writes.
      latest: the last value of every metric.
    """

    def __init__(
        self,
        run: Run,
        model: Model,
        objective: Objective,
        optimizer: OptimizerConfig,
        config: TrainerConfig,
        mesh: Mesh,
        batches: Batches,
        callbacks: Sequence[Callback] = (),
        *,
        initial_weights: InitialWeights | None = None,
        cache: CompilationCache = CompilationCache(None),
        compiler_options: dict | None = None,
    ):
        """Compiles nothing, and takes no memory of a device.

        Args:
          callbacks: around the steps; `standard_callbacks` gives the usual ones.
          initial_weights: weights of a new run, instead of random ones.
          cache: where compiled programs are looked for first.
          compiler_options: XLA's for the train step.

        Raises:
          ValueError: mesh, model or parameter groups do not go together.
        """
        self.run_folder, self.model, self.objective, self.config, self.mesh = run, model, objective, config, mesh
        self.batches, self.callbacks = batches, list(callbacks)
        self._optimizer, self._initial_weights = optimizer, initial_weights
        self._cache, self._compiler_options = cache, compiler_options
        self._transform = make_optimizer(optimizer, config.train_steps)
        self.abstract = abstract_state(model, self._transform, mesh, optimizer.groups, objective.initial_extra)
        self.kernel = model.attention(row_length(batches.columns), is_packed(batches.columns), mesh)
        self.positions, self.step, self.start_step = dict.fromkeys(batches.fingerprints, 0), 0, 0
        self.writer: MetricsWriter | NoMetrics = NoMetrics()
        self.latest: dict[str, float] = {}
        self._on_cpus = mesh.devices.flat[0].platform == "cpu"
        self._prepared = False

    def prepare(self) -> None:
        """Compiles, then restores the run or starts one. `run` calls it if the caller has not.

        Raises:
          ValueError: batch and mesh do not divide.
          OutOfMemory: the devices have too little.
          CheckpointError: the initial weights do not fit, the folder holds another run, or nothing in it can be read.
        """
        folder, goodput = self.run_folder.folder, self.run_folder.goodput
        if self._initial_weights is not None and not saved_steps(folder):
            self._initial_weights.check(self.abstract.all_params)
        goodput.count("starting")
        self._compile()
        self.checkpoints = open_checkpoints(
            folder, self.config.keep_checkpoints, self.config.keep_every, self.run_folder.spool
        )
        self.run_folder.activity.now("restoring the state", patience=_STORAGE_PATIENCE)
        # The program that makes the first state is kept like those of the steps.
        with explain_out_of_memory("restoring the state", folder, self.abstract), self._cache.compiling():
            self.state = self._restored() or self._new_state()
        self.step = self.start_step = int(self.state.step)
        return_freed_memory()
        goodput.count("restoring")
        goodput.resumed(self.start_step)
        self._prepared = True

    def _compile(self) -> None:
        config, cache, began = self.config, self._cache, time.perf_counter()
        self.run_folder.activity.now("compiling the train step")
        with (
            explain_out_of_memory("compiling the train step", self.run_folder.folder, self.abstract),
            cache.compiling() as found,
        ):
            self._train_step = compile_run(
                self.model,
                self.objective,
                self._optimizer,
                config.train_steps,
                self.mesh,
                batch_size=next(iter(self.batches.shapes.values())).shape[0],
                columns=self.batches.columns,
                accumulation=config.accumulation(self.mesh),
                seed=config.seed,
                compiler_options=self._compiler_options,
            )
            for callback in self.callbacks:
                callback.compile(self)
        kept = f"; {found['hits']} program(s) found in {cache.folder}, {found['misses']} put there"
        hosts.log_on_main(
            "compiled in %.1f s%s; a batch is computed in %d part(s)",
            time.perf_counter() - began,
            kept if cache.folder else "",
            config.accumulation(self.mesh),
        )
        self.run_folder.goodput.count("compiling")

    def _restored(self) -> TrainState | None:
        restored = self.checkpoints.restore_latest(trees_of(self.abstract))
        if restored is None:
            return None
        step, trees, metadata = restored
        there, here, folder = metadata["fingerprints"], self.batches.fingerprints, self.run_folder.folder
        if there != here:
            changed = sorted(stream for stream in there.keys() | here.keys() if there.get(stream) != here.get(stream))
            raise CheckpointError(
                f"{folder} was trained on other data (another corpus, vocabulary, mixture, seed or sequence length, or "
                f"rollouts of other sizes or sampling; data stream {', '.join(changed)}), so its data position means "
                f"nothing here. Restore the data or the settings, or "
                f"start a new OUTPUT_DIR with INITIAL_CHECKPOINT={folder}"
            )
        self.positions = dict(metadata["positions"])
        hosts.log_on_main("resuming %s after step %d, at %s", folder, step, _listed(self.positions))
        return state_from(jax.device_put(np.int32(step), self.abstract.step.sharding), trees)

    def _new_state(self) -> TrainState:
        groups = self._optimizer.groups
        extra = self.objective.initial_extra
        state = initial_state(self.model, self._transform, self.mesh, self.config.seed, groups, extra)
        if self._initial_weights is None:
            return state
        loaded = self._initial_weights.load(self.abstract.all_params)
        params, frozen = split_params(overlay_params(state.all_params, loaded), groups)
        hosts.log_on_main("starting from the weights of %s", self._initial_weights)
        return dataclasses.replace(state, params=params, frozen=frozen)

    def save(self) -> None:
        """Starts to save a checkpoint of the state; does nothing where this step was the last to be saved."""
        activity = self.run_folder.activity
        activity.now("saving a checkpoint", self.step, together=True, patience=_STORAGE_PATIENCE)
        skipped = {stream: self.run_folder.skipped_examples(stream) for stream in self.positions}
        metadata = {
            "positions": self.positions,
            "fingerprints": self.batches.fingerprints,
            "skipped_examples": {stream: [list(span) for span in spans] for stream, spans in skipped.items()},
        }
        self.checkpoints.save(self.step, trees_of(self.state), metadata)

    def write(self, values: dict[str, float]) -> None:
        """Writes a row of metrics after the current step."""
        self.writer.write(self.step, values)
        self.latest.update(values)

    def run(self) -> dict[str, float]:
        """Trains to the last step, or until SIGTERM or Ctrl-C.

        Returns:
          The last metrics, with "step".

        Raises:
          KeyboardInterrupt: Ctrl-C came, and the run is saved.
          TrainingDiverged: the loss or the gradient became infinite or NaN; nothing is saved after that.
          OutOfMemory: a step needs more memory than the devices have.
        """
        if not self._prepared:
            self.prepare()
        opened: list[Callback] = []
        try:
            with (
                self.run_folder.preemption() as stop,
                explain_out_of_memory("training", self.run_folder.folder, self.abstract),
            ):
                self.batches.start(self.positions)
                for callback in self.callbacks:
                    opened.append(callback)
                    callback.begin(self)
                self._loop(stop)
        except BaseException:
            # In a job, a save in the background may wait for a process that is lost: then it is left behind.
            if hosts.process_count() == 1:
                self.checkpoints.close()
            raise
        finally:
            self.batches.close()
            for callback in reversed(opened):
                callback.close()
        self.checkpoints.close()
        return {"step": self.step, **self.latest}

    def _loop(self, stop) -> None:
        callbacks, metrics = self.callbacks, None
        for callback in callbacks:
            callback.resume(self)
        while self.step < self.config.train_steps and not stop.should_stop(self.step):
            for callback in callbacks:
                callback.before_step(self)
            batch = self._next_batch(metrics)
            self.run_folder.activity.now("computing", self.step, together=True)
            if self._on_cpus:
                # A program for CPUs takes its memory when it is called: two at once would take twice as much.
                jax.block_until_ready(self.state.step)
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                self.state, metrics = self._train_step(self.state, batch)
            self.step += 1
            self.positions = dict(self.batches.positions)
            for callback in callbacks:
                callback.after_step(self, metrics)
            if due := [callback for callback in callbacks if callback.due(self)]:
                self.settle()
                for callback in due:
                    callback.act(self)
                for callback in callbacks:
                    callback.resume(self)
        self.stopped_by = stop.cause
        self.settle()
        for callback in reversed(callbacks):
            callback.end(self)

    def settle(self) -> None:
        """Reads the metrics of every step so far, waiting for them, and accounts for their time.

        Raises:
          TrainingDiverged: the last update harmed the model.
        """
        for callback in self.callbacks:
            callback.settle(self)
        self.run_folder.goodput.count("steps")

    def _next_batch(self, running: dict[str, jax.Array] | None) -> dict[str, jax.Array]:
        goodput = self.run_folder.goodput
        goodput.count("steps")
        self.run_folder.activity.now(f"reading the batch of step {self.step + 1}", self.step)
        batch = self.batches.next()
        # Nothing was lost while the devices still computed the step before.
        # The stub of jax.Array leaves out `is_ready`, which its implementation has.
        busy = running is not None and not running["loss"].is_ready()  # ty: ignore[missing-attribute]
        goodput.count("steps" if busy else "data")
        return batch


def _listed(positions: dict[str, int]) -> str:
    return ", ".join(f"example {position} of {stream}" for stream, position in sorted(positions.items()))
