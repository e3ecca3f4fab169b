"""Rollouts as the batches of a Trainer: the policy responds, models and rewards judge, minibatches go to the updates.

A rollout is `prompts` x `responses_per_prompt` rows. Its minibatches are taken `epochs` times, in a new order each time
(N). Before each rollout the engine takes over the weights of training.
"""

import dataclasses
import hashlib
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax import files
from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.experience import Algorithm, Experience, token_weights
from qwen_jax.alignment.responses import Responder, Responses, read_prompts
from qwen_jax.alignment.rewards import RewardFunction, check_scores, compute_rewards
from qwen_jax.alignment.rollout_metrics import rollout_metrics, sample_lines
from qwen_jax.alignment.scoring import Scorer, place_rows
from qwen_jax.batch_spec import Column
from qwen_jax.checkpoints.rewind import after_skipped
from qwen_jax.checkpoints.run_folder import CheckpointError, saved_steps
from qwen_jax.distributed import hosts
from qwen_jax.host_memory import return_freed_memory
from qwen_jax.inference import SamplingConfig
from qwen_jax.inference.text import token_bytes
from qwen_jax.training.batches import Examples
from qwen_jax.training.callbacks import Callback
from qwen_jax.training.step import batch_shapes
from qwen_jax.training.trainer_config import TrainerConfig

PROMPTS, PRETRAINING = "prompts", "pretraining"
# Folders of a run: examples of responses, and rollouts that a stop has cut through.
SAMPLES_FOLDER, EXPERIENCE_FOLDER = "rollouts", "experience"
_PRETRAINING_COLUMNS = ("tokens", "loss_weights", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sizes of rollouts, and how responses are sampled (report 3.2.2: two responses to a query, top-p 0.9).

    Attributes:
      length: tokens of a row: of a prompt and its response.
      prompt_length: tokens of a prompt, at most; prompts are packed to it. The rest of `length` is for the response.
      prompts: prompts of a rollout.
      responses_per_prompt: of each.
      epochs: how often the rows of a rollout are used (4 in N).
      temperature: divides the logits at sampling, and in every log-probability of the policy and the reference.
      top_p: of sampling.
      pretraining_rows: rows of pretraining text beside each row of a minibatch, where the algorithm has a pretraining
        coefficient. The report has far more pretraining than PPO data; InstructGPT 8 to 1.
      slots: responses that are generated together.
      seed: of sampling and of the order of rows.
    """

    length: int
    prompt_length: int
    prompts: int
    responses_per_prompt: int = 2
    epochs: int = 4
    temperature: float = 1.0
    top_p: float = 0.9
    pretraining_rows: int = 8
    slots: int = 64
    seed: int = 0

    def __post_init__(self):
        least = {"pretraining_rows": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or value < least.get(field.name, 1)):
                raise ValueError(
                    f"RolloutConfig.{field.name} must be an integer of at least {least.get(field.name, 1)}, "
                    f"found {value!r}"
                )
        if not self.temperature > 0:
            raise ValueError(f"RolloutConfig.temperature must be positive, found {self.temperature!r}")
        SamplingConfig(self.temperature, top_p=self.top_p)  # checks top_p
        if self.response_length < 1:
            raise ValueError(
                f"RolloutConfig.length {self.length} leaves no room for a response after a prompt of "
                f"{self.prompt_length} tokens: raise SEQUENCE_LENGTH or lower PROMPT_LENGTH"
            )

    @property
    def rows(self) -> int:
        """Responses of a rollout."""
        return self.prompts * self.responses_per_prompt

    @property
    def response_length(self) -> int:
        """Tokens of a response with its end token, at most."""
        return self.length - self.prompt_length

    def steps(self, batch_size: int) -> int:
        """Updates between two rollouts.

        Raises:
          ValueError: the rows do not divide into minibatches.
        """
        if self.rows % batch_size:
            raise ValueError(
                f"a rollout of {self.prompts} prompts x {self.responses_per_prompt} responses does not divide into "
                f"minibatches of BATCH_SIZE {batch_size}: make ROLLOUT_PROMPTS x RESPONSES_PER_PROMPT a multiple "
                f"of it"
            )
        return self.epochs * self.rows // batch_size


def rollout_columns(
    algorithm: Algorithm, length: int, beside: int, pretraining: Sequence[Column]
) -> tuple[Column, ...]:
    """The columns of a minibatch: those of the algorithm, and pretraining text.

    Args:
      length: tokens of a row.
      beside: rows of pretraining text beside each row; 0: no such columns.
      pretraining: the columns of that text; of further ones than an objective reads, none is taken.
    """
    text = [column for column in pretraining if beside and column.name in _PRETRAINING_COLUMNS]
    named = [Column(f"{PRETRAINING}_{one.name}", one.dtype, (beside, *one.shape), (None, *one.axes)) for one in text]
    return (*algorithm.columns(length), *named)


class Rollouts(Callback):
    """Generates rollouts, and gives their minibatches to the Trainer: both its `Batches` and a callback.

    Where the mesh spans several processes, each generates and judges the same rows, and process 0 computes the rewards
    of functions. Positions in the data count prompts and rows of pretraining text. A stop within a rollout leaves the
    rollout in `experience/`, so that a run goes on exactly wherever it was saved.

    Attributes:
      columns, shapes, fingerprints, positions, waited: see `qwen_jax.training.batches.Batches`.
      steps: updates between two rollouts.
    """

    def __init__(
        self,
        model: ActorCritic,
        algorithm: Algorithm,
        config: RolloutConfig,
        mesh: Mesh,
        folder: Path,
        *,
        prompts: Examples,
        pretraining: Examples | None,
        batch_size: int,
        rows_at_a_time: int,
        tokenizer,
        stop_ids: Sequence[int],
        reward: RewardFunction | None = None,
        watched: Mapping[str, RewardFunction] | None = None,
        skipped: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ):
        """Generates nothing yet.

        Args:
          folder: of the run.
          prompts: rows of one prompt each.
          pretraining: rows of pretraining text of the length of a row; None: no pretraining gradient.
          batch_size: rows of a minibatch.
          rows_at_a_time: rows that the models judge together.
          tokenizer: with `decode_bytes` and `vocab_size`.
          stop_ids: end tokens; the first one is where a reward model reads.
          reward: computes the rewards; None: the reward model of `model` does.
          watched: further rewards that are only logged, by name.
          skipped: spans of each data stream that are passed over.

        Raises:
          ValueError: the sizes do not divide, the data have other lengths, there is no reward, or are two, or the
            algorithm compares more responses than a prompt gets.
        """
        self.model, self.algorithm, self.config, self._mesh, self._folder = model, algorithm, config, mesh, folder
        if (reward is None) == (model.reward_config is None):
            raise ValueError("rewards come from a reward model or from a reward function: give one of the two")
        if config.responses_per_prompt < algorithm.least_responses:
            raise ValueError(
                f"{type(algorithm).__name__} compares the responses to a prompt with each other and gets "
                f"{config.responses_per_prompt} of each: RESPONSES_PER_PROMPT must be at least "
                f"{algorithm.least_responses}"
            )
        _check_lengths(config, prompts, pretraining)
        self._prompts, self._pretraining, self._tokenizer = prompts, pretraining, tokenizer
        self._stop_ids, self._reward, self._watched = tuple(stop_ids), reward, dict(watched or {})
        self._skipped, self._batch_size = dict(skipped or {}), batch_size
        self.steps = config.steps(batch_size)
        self._beside = config.pretraining_rows if pretraining is not None else 0
        own = algorithm.columns(config.length)
        self.columns = rollout_columns(
            algorithm, config.length, self._beside, pretraining.columns if pretraining is not None else ()
        )
        self.shapes = batch_shapes(mesh, batch_size, self.columns)
        self._own = {column.name for column in own}
        # How many responses are generated together is for a machine to choose, and changes none of them.
        sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "slots"}
        identity = [prompts.fingerprint, sizes, batch_size]
        self.fingerprints = {PROMPTS: hashlib.sha256(json.dumps(identity).encode()).hexdigest()}
        if pretraining is not None:
            self.fingerprints[PRETRAINING] = pretraining.fingerprint
        self.positions, self.waited = dict.fromkeys(self.fingerprints, 0), 0.0
        sampling = SamplingConfig(config.temperature, top_p=config.top_p)
        self._responder = Responder(model.policy, mesh, sampling, stop_ids, config.length, config.slots)
        self._scorer = Scorer(model, mesh, rows_at_a_time, config.length, config.temperature, config.top_p)
        self._rollout: dict[str, np.ndarray] | None = None
        self._index = self._start = 0
        self._metrics: dict[str, float] = {}
        self._done: float | None = None

    # As Batches.

    def start(self, positions: Mapping[str, int]) -> None:
        """Begins at these positions."""
        self.positions = {stream: positions.get(stream, 0) for stream in self.fingerprints}

    def next(self) -> dict[str, jax.Array]:
        """The minibatch of the next update, of the rollout that `before_step` has made or loaded."""
        assert self._rollout is not None  # `before_step` comes first
        began = time.perf_counter()
        size, config = self._batch_size, self.config
        epoch, part = divmod(self._index, config.rows // size)
        order = np.random.default_rng([config.seed, self._start, epoch]).permutation(config.rows)
        rows = order[part * size : (part + 1) * size]
        values = {name: self._rollout[name][rows] for name in self._own & self._rollout.keys()}
        mask = self._rollout["mask"][rows]
        values["weights"] = token_weights(mask, self.algorithm.aggregation, config.response_length)
        values["first_epoch"] = np.full(size, epoch == 0, np.float32)
        batch = place_rows(values, {name: self.shapes[name] for name in self._own}) | self._pretraining_batch()
        self._index += 1
        if PRETRAINING in self.positions:
            self.positions[PRETRAINING] = self._pretraining_start() + size * self._beside
        if self._index == self.steps:
            self.positions[PROMPTS] = self._start + config.prompts
        self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Nothing stays open."""

    def _pretraining_start(self) -> int:
        return after_skipped(self.positions[PRETRAINING], self._skipped.get(PRETRAINING, ()))

    def _pretraining_batch(self) -> dict[str, jax.Array]:
        """Columns of pretraining text; each process reads the rows of its own devices alone."""
        if not self._beside:
            return {}
        assert self._pretraining is not None  # `_beside` is 0 without it
        examples, start, beside = self._pretraining, self._pretraining_start(), self._beside
        read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

        def part(name, index):
            first, last, _ = index[0].indices(self._batch_size)
            if (first, last) not in read:
                read[first, last] = examples.read(start + first * beside, start + last * beside)
            values = read[first, last][name.removeprefix(f"{PRETRAINING}_")]
            return values.reshape(last - first, beside, *values.shape[1:])[:, *index[1:]]

        return {
            name: jax.make_array_from_callback(shape.shape, shape.sharding, lambda index, name=name: part(name, index))
            for name, shape in self.shapes.items()
            if name not in self._own
        }

    # As a callback.

    def check_intervals(self, config: TrainerConfig) -> None:
        """Refuses a run that is saved, or ends, within a rollout.

        Raises:
          ValueError: the message has the number that the intervals must be multiples of.
        """
        for name in ("checkpoint_every", "train_steps"):
            value = getattr(config, name)
            if value % self.steps:
                raise ValueError(
                    f"{name.upper()} is {value}, and a rollout gives {self.steps} updates ({self.config.epochs} epochs "
                    f"x {self.config.rows} rows / BATCH_SIZE {self._batch_size}): set it to a multiple of {self.steps}"
                )

    def compile(self, trainer):
        """Compiles the program that judges rollouts; the engine compiles its own as it meets their sizes."""
        self.check_intervals(trainer.config)
        self._scorer.compile(trainer.abstract.all_params)

    def before_step(self, trainer):
        """Makes a rollout where the last one is used up, or loads the one that a stop has cut through."""
        index = trainer.step % self.steps
        if index == 0:
            self._make(trainer)
        elif self._rollout is None:
            self._load(trainer, trainer.step - index)
        self._index = index

    def after_step(self, trainer, metrics):
        """Writes the metrics of a new rollout, after its first update."""
        if self._metrics:
            trainer.write(self._metrics)
            self._metrics = {}

    def end(self, trainer):
        """Keeps a rollout that a stop cuts through."""
        index = trainer.step % self.steps
        if index and self._rollout is not None and hosts.process_index() == 0:
            path = self._experience_file(trainer.step - index)
            path.parent.mkdir(exist_ok=True)
            with files.new_file(path) as temporary, open(temporary, "wb") as file:
                arrays: dict[str, Any] = {"start": np.int64(self._start), **self._rollout}
                np.savez(file, **arrays)
            self._remove_unreachable(trainer.step - index)

    def _remove_unreachable(self, kept: int) -> None:
        """Removes rollouts that no checkpoint lies within any more; `kept` is the step of one that will have one."""
        saved = saved_steps(self._folder)
        for path in (self._folder / EXPERIENCE_FOLDER).glob("*.npz"):
            first = int(path.stem) if path.stem.isdigit() else kept
            if first != kept and not any(first < step < first + self.steps for step in saved):
                path.unlink(missing_ok=True)

    def _experience_file(self, step: int) -> Path:
        return self._folder / EXPERIENCE_FOLDER / f"{step}.npz"

    def _load(self, trainer, step: int) -> None:
        path = self._experience_file(step)
        try:
            with files.open_file(path) as file, np.load(file) as stored:
                rollout = dict(stored)
            self._start, self._rollout = int(rollout.pop("start")), rollout
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"the checkpoint of step {trainer.step} lies within the rollout that began at step {step}, and "
                f"{path} cannot be read ({error}): go on from an earlier checkpoint with tools/rewind.py"
            ) from error

    def _make(self, trainer) -> None:
        """Generates and judges a rollout with the weights of the trainer."""
        activity, config, params = trainer.run_folder.activity, self.config, trainer.state.all_params
        self._start = after_skipped(self.positions[PROMPTS], self._skipped.get(PROMPTS, ()))
        trainer.settle()  # weights that an update has harmed make no rollout
        jax.block_until_ready(trainer.state.step)
        times = [time.perf_counter()]
        update = 0.0 if self._done is None else times[0] - self._done
        activity.now("handing the weights to the engine", trainer.step, together=True)
        self._responder.take_weights(params["policy"])
        times.append(time.perf_counter())
        prompts = read_prompts(self._prompts, self._start, config.prompts)
        responses = self._responder.respond(
            prompts,
            config.responses_per_prompt,
            config.response_length,
            config.seed,
            lambda done: activity.now(f"generating, {done} of {config.rows} responses", trainer.step, together=True),
        )
        self._responder.release_weights()
        if self._responder.has_compiled():
            return_freed_memory()
        times.append(time.perf_counter())
        activity.now("judging the responses", trainer.step, together=True)
        judged = self._scorer(params, responses.tokens, responses.last, self._stop_ids[0])
        texts = self._texts(responses)
        scores = self._scores(judged, texts, trainer.step)
        watched = {name: self._computed(one, name, texts, trainer.step) for name, one in self._watched.items()}
        experience = Experience(
            responses.tokens,
            responses.mask,
            responses.behavior_log_probs,
            judged["log_probs"],
            judged["reference_log_probs"],
            judged.get("values"),
            scores,
            responses.ended,
            config.responses_per_prompt,
        )
        extra = jax.device_get(trainer.state.extra)
        columns, found = self.algorithm.prepare(experience, extra)
        self._rollout = {**columns, "mask": responses.mask}
        times.append(time.perf_counter())
        self._done = times[-1]
        seconds = dict(zip(("weights", "generation", "scoring"), np.diff(times), strict=True)) | {"update": update}
        self._metrics = rollout_metrics(experience, judged, watched, seconds) | {
            f"rollout/{name}": value for name, value in found.items()
        }
        self._show(trainer, texts, scores)

    def _texts(self, responses: Responses) -> list[tuple[str, str, str | None]]:
        """(prompt, response without its end token, reference answer) of each row."""

        def text(ids):
            return b"".join(token_bytes(self._tokenizer, token) for token in ids).decode("utf-8", "replace")

        found = []
        for prompt, response in zip(responses.prompts, responses.responses, strict=True):
            ids = response[:-1] if response[-1] in self._stop_ids else response
            found.append((text(prompt.tokens), text(ids), text(prompt.answer) if prompt.answer else None))
        return found

    def _scores(self, judged: dict[str, np.ndarray], texts, step: int) -> np.ndarray:
        if self._reward is not None:
            return self._computed(self._reward, "of the run", texts, step)
        check_scores(judged["scores"].tolist(), self._start, self.config.responses_per_prompt)
        return judged["scores"]

    def _computed(self, function: RewardFunction, name: str, texts, step: int) -> np.ndarray:
        """Rewards of a function, float32 [rows], computed once for all processes."""
        rewards = hosts.run_on_main(
            f"rewards/{name}/{step}",
            f"process 0 to compute the reward {name}",
            lambda: compute_rewards(function, name, texts, self._start, self.config.responses_per_prompt),
        )
        return np.asarray(rewards, np.float32)

    def _show(self, trainer, texts, scores: np.ndarray) -> None:
        """Writes some responses to a file, and says how the rollout went where a row of metrics is due."""
        if hosts.process_index():
            return
        path = self._folder / SAMPLES_FOLDER / f"{trainer.step:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, sample_lines(texts, scores))
        every = max(trainer.config.log_every // self.steps, 1)
        if trainer.step // self.steps % every == 0:
            found = {name.removeprefix("rollout/"): value for name, value in self._metrics.items()}
            trainer.writer.say(
                f"rollout at step {trainer.step}: reward {found['reward']:.3f}, KL {found['kl']:.2f} nats a response, "
                f"{found['response_length']:.1f} tokens, {found['without_end']:.0%} without end, generation "
                f"{found['seconds/generation']:.1f} s of {sum(found[f'seconds/{n}'] for n in _SECONDS):.1f} s"
            )


_SECONDS = ("weights", "generation", "scoring")


def _check_lengths(config: RolloutConfig, prompts: Examples, pretraining: Examples | None) -> None:
    for name, examples, length in (
        ("prompts", prompts, config.prompt_length),
        (PRETRAINING, pretraining, config.length),
    ):
        found = None if examples is None else next(c.shape[0] for c in examples.columns if c.name == "tokens")
        if found is not None and found != length:
            raise ValueError(f"the rows of {name} have {found} tokens, expected {length}: cache them at this length")
