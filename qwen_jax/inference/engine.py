"""Generation for many prompts at once: a batch of rows, in which each finished one makes room for the next prompt.

Prompts are computed in buckets of lengths; then all rows decode together, many tokens for each look of the host. A row
has its own length, rules and random numbers, so what is generated for a prompt does not depend on the rows beside it.
"""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax.inference import programs
from qwen_jax.inference.programs import MAX_STEPS, RowRules
from qwen_jax.inference.requests import LENGTH, STOP_ID, STOP_STRING, Request, Result, StreamChunk, check_request
from qwen_jax.inference.sampling import RowSampling, SamplingConfig
from qwen_jax.inference.text import TextStream, token_bytes
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import num_batch_shards, tree_shardings

log = logging.getLogger(__name__)

SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64
# Prompts that are computed at once, and how many tokens they may have together with their padding.
PREFILL_ROWS, PREFILL_TOKENS = (1, 4, 16), 8192
STEPS_BEFORE_STOP_STRINGS = 8
STREAM_SECONDS = 0.1


def bucket(length: int, smallest: int) -> int:
    """The size that `length` is computed with: a power of two, so that few programs are compiled."""
    return max(smallest, 1 << (length - 1).bit_length())


class Engine:
    """Generates continuations of prompts.

    Programs are compiled for powers of two: of prompt lengths, of how many positions the cache has, and of rows if a
    call has fewer requests than `slots`. Each is compiled once and logged. A cache grows with its longest row.

    Attributes:
      params: the weights as `unstack_layers` gives them, in the compute dtype.
      context_length: how many tokens a prompt and its continuation may have together.
    """

    def __init__(
        self,
        model: Qwen,
        params,
        tokenizer=None,
        mesh: Mesh | None = None,
        slots: int = 16,
        context_length: int | None = None,
    ):
        """Takes a copy of the weights in the compute dtype, block by block: decoding is bound by reading them.

        Args:
          model, params: as `load_pretrained` returns them, or as a training state holds them.
          tokenizer: with `decode_bytes` and `vocab_size`; without one there is no text and are no stop strings.
          mesh: the devices, from `qwen_jax.sharding.make_mesh`: weights lie on them as in training, rows over `data`
            and `fsdp`, heads over `tensor`. None: one device.
          slots: how many requests are generated together, at most.
          context_length: see above; by default the model's `inference_length`.

        Raises:
          ValueError: the parameters are not of this model, the mesh does not divide it, or a number is out of range.
        """
        config = model.config
        self._length_rule = f"the model's context_length of {config.context_length}"
        if config.use_dynamic_ntk:
            self._length_rule = f"which dynamic NTK makes of {self._length_rule}"
        if context_length is not None and not 2 <= context_length <= config.inference_length:
            raise ValueError(
                f"context_length must be from 2 to {config.inference_length} ({self._length_rule}), "
                f"found {context_length}"
            )
        if context_length is not None and context_length < config.inference_length:
            self._length_rule = "the engine's context_length"
        if not isinstance(slots, int) or slots < 1:
            raise ValueError(f"slots must be a positive integer, found {slots!r}")
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.context_length = context_length or config.inference_length
        self.ways = num_batch_shards(mesh) if mesh is not None else 1
        self.slots = -(-slots // self.ways) * self.ways
        self._compiled: set[tuple] = set()
        self.set_params(params)

    def set_params(self, params) -> None:
        """Goes on with other weights of the same model; no program is compiled anew.

        Raises:
          ValueError: they are not of this model.
        """
        boxed = abstract_params(self.model)
        _check_params(params, nn.meta.unbox(boxed))
        # Said in either case: JAX compiles anew for arrays that could lie elsewhere, such as NumPy's.
        one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = jax.device_put(params, one_device if self.mesh is None else tree_shardings(boxed, self.mesh))
        self.params = self.call(programs.prepare, ("prepare weights",), self.model.config, params)

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._compiled)

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results in the order in which they finish; `Result.index` says which request one belongs to.

        Args:
          requests: a sequence is checked as a whole before anything is computed; anything else is read as rows become
            free.

        Raises:
          ValueError: see `check_request`; the message has the index of the request.
        """
        many = None
        if isinstance(requests, Sequence):
            requests = [self._checked(request, index) for index, request in enumerate(requests)]
            many = len(requests)
        return (item for item in self._run(requests, self._rows(many), False) if isinstance(item, Result))

    def stream(self, request: Request) -> Iterator[StreamChunk]:
        """One continuation in pieces, as it comes.

        Raises:
          ValueError: see `check_request`.
        """
        requests = [self._checked(request, None)]
        return (item for item in self._run(requests, self._rows(1), True) if isinstance(item, StreamChunk))

    def _checked(self, request: Request, index: int | None) -> Request:
        try:
            return check_request(
                request, self.model.config.vocab_size, self.context_length, self._length_rule, self.tokenizer
            )
        except ValueError as error:
            raise ValueError(f"request {index}: {error}" if index is not None else str(error)) from error

    def _rows(self, many: int | None) -> int:
        rows = self.slots if many is None else min(self.slots, bucket(max(many, 1), 1))
        return -(-rows // self.ways) * self.ways

    def _run(self, requests: Iterable[Request], rows: int, streaming: bool) -> Iterator[StreamChunk | Result]:
        queue = enumerate(requests)
        if not isinstance(requests, list):
            queue = ((index, self._checked(request, index)) for index, request in queue)
        batch = _Batch(self, rows, streaming)
        waiting = True
        while True:
            fresh = list(itertools.islice(queue, batch.free)) if waiting else []
            waiting = waiting and batch.free == len(fresh)
            if fresh:
                yield from batch.start(fresh)
            elif not batch.busy:
                return
            if batch.busy:
                yield from batch.proceed(waiting)

    def call(self, program, key: tuple, *arguments) -> Any:
        """Runs one of `programs` on the mesh. `key` has what its shapes depend on."""
        begun = time.perf_counter()
        result = program(self.mesh, *arguments)
        if key not in self._compiled:
            self._compiled.add(key)
            log.info(
                "compiled %s in %.1f s; %d programs so far",
                " ".join(str(part) for part in key),
                time.perf_counter() - begun,
                len(self._compiled),
            )
        return result


class _Row:
    """One request while it is generated."""

    def __init__(self, index: int, request: Request, tokenizer):
        self.index, self.request, self.tokenizer = index, request, tokenizer
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.text = TextStream(request.stop_strings) if tokenizer is not None else None
        self.finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    @property
    def end(self) -> int:
        """How many tokens it may have."""
        return len(self.request.prompt) + self.request.max_new_tokens

    def take(self, tokens: Sequence[int], log_probs: Sequence[float]) -> StreamChunk:
        """Adds new tokens, up to the one that ends it."""
        before, text = len(self.tokens), ""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            if token in self.request.stop_ids:
                self.finish_reason = STOP_ID
            elif self.text is not None:
                text += self.text.feed(token_bytes(self.tokenizer, token))
                if self.text.stopped:
                    self.finish_reason = STOP_STRING
            if self.finish_reason is None and len(self.tokens) == self.request.max_new_tokens:
                self.finish_reason = LENGTH
            if self.finish_reason:
                text += self.text.finish() if self.text is not None else ""
                break
        return StreamChunk(
            tuple(self.tokens[before:]),
            tuple(self.log_probs[before:]),
            text if self.text is not None else None,
            self.finish_reason,
        )

    def result(self) -> Result:
        return Result(
            self.index,
            self.request,
            tuple(self.tokens),
            np.asarray(self.log_probs, np.float32),
            self.text.text if self.text is not None else None,
            self.finish_reason,
        )


def sampling_of(requests: Sequence[Request | None]) -> RowSampling:
    """How the rows of these requests draw; a row without one takes the most probable token."""
    return RowSampling.of(
        [request.sampling if request else SamplingConfig() for request in requests],
        [request.seed if request else 0 for request in requests],
    )


def rules_of(requests: Sequence[Request | None]) -> RowRules:
    """The requests of rows as arrays; a row without one gets rules that do nothing."""
    width = bucket(max([8, *(len(request.stop_ids) for request in requests if request)]), 8)
    stop_ids = np.full((len(requests), width), -1, np.int32)
    for row, request in enumerate(requests):
        if request:
            stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    ends = [len(request.prompt) + request.max_new_tokens if request else 1 for request in requests]
    return RowRules(sampling_of(requests), stop_ids, np.asarray(ends, np.int32))


def _kind(greedy: bool) -> str:
    return "greedy" if greedy else "sampling"


class _Batch:
    """The rows of one call."""

    def __init__(self, engine: Engine, rows: int, streaming: bool):
        self.engine, self.streaming = engine, streaming
        self.rows: list[_Row | None] = [None] * rows
        self.slots = SMALLEST_CACHE
        self.state = None
        self.rules = None  # made anew when a row changes
        self.step_seconds = STREAM_SECONDS

    @property
    def free(self) -> int:
        return self.rows.count(None)

    @property
    def busy(self) -> int:
        return len(self.rows) - self.free

    def start(self, fresh: list[tuple[int, Request]]) -> Iterator[StreamChunk | Result]:
        """Computes the prompts of new requests and puts them into free rows."""
        by_bucket: dict[int, list[_Row]] = {}
        for index, request in fresh:
            row = _Row(index, request, self.engine.tokenizer)
            by_bucket.setdefault(bucket(len(request.prompt), SMALLEST_PROMPT), []).append(row)
        for size, rows in sorted(by_bucket.items()):
            most = max(count for count in PREFILL_ROWS if count == 1 or count * size <= PREFILL_TOKENS)
            for start in range(0, len(rows), most * self.engine.ways):
                yield from self._prefill(size, rows[start : start + most * self.engine.ways])

    def _prefill(self, size: int, rows: list[_Row]) -> Iterator[StreamChunk | Result]:
        engine, ways = self.engine, self.engine.ways
        count = next(count * ways for count in PREFILL_ROWS if count * ways >= len(rows))
        # Filled up with copies of the last one, which are written to the same place.
        filled = rows + [rows[-1]] * (count - len(rows))
        tokens = np.zeros((count, size), np.int32)
        for place, row in enumerate(filled):
            tokens[place, : row.length] = row.request.prompt
        lengths = np.asarray([row.length for row in filled], np.int32)
        sampling = sampling_of([row.request for row in filled])
        cache, logits, seen = engine.call(
            programs.prefill,
            ("prefill", f"{count} x {size} tokens"),
            engine.model.config,
            engine.params,
            tokens,
            lengths,
        )
        greedy = not sampling.temperature.any()
        first, log_probs, seen = engine.call(
            programs.first_tokens,
            ("first tokens", f"{count} rows", _kind(greedy)),
            logits,
            seen,
            lengths,
            sampling,
            greedy,
        )
        free = [place for place, row in enumerate(self.rows) if row is None]
        places = dict(zip(rows, free, strict=False))
        self._reserve(size)
        self.state = engine.call(
            programs.insert,
            ("insert", *self._shape(), f"{count} x {size} tokens"),
            self.state,
            cache,
            first,
            lengths,
            seen,
            np.asarray([places[row] for row in filled], np.int32),
        )
        first, log_probs = jax.device_get((first, log_probs))
        for place, row in enumerate(rows):
            self.rows[places[row]] = row
            yield from self._take(places[row], first[place : place + 1], log_probs[place : place + 1])
        self.rules = None

    def proceed(self, waiting: bool) -> Iterator[StreamChunk | Result]:
        """Generates tokens for all rows; stops early when some have finished and others wait for room."""
        engine = self.engine
        steps = self._steps()
        self._reserve(max(min(row.length + steps, row.end) for row in self.rows if row))
        if self.rules is None:
            self.rules = rules_of([row.request if row else None for row in self.rows])
        active = np.asarray([row is not None for row in self.rows])
        floor = max(self.busy - max(1, len(self.rows) // 8), 0) if waiting else 0
        greedy = not self.rules.sampling.temperature.any()
        width = self.rules.stop_ids.shape[1]
        begun = time.perf_counter()
        known = engine.compilations
        self.state, tokens, log_probs, counts = engine.call(
            programs.generate,
            ("generate", *self._shape(), _kind(greedy), f"{width} stop ids"),
            engine.model.config,
            engine.params,
            self.state,
            active,
            self.rules,
            np.int32(steps),
            np.int32(floor),
            greedy,
        )
        tokens, log_probs, counts = jax.device_get((tokens, log_probs, counts))
        if engine.compilations == known:
            self.step_seconds = (time.perf_counter() - begun) / max(counts.max(), 1)
        for place, row in enumerate(self.rows):
            if row is not None:
                count = counts[place]
                yield from self._take(place, tokens[place, :count], log_probs[place, :count])

    def _take(self, place: int, tokens: np.ndarray, log_probs: np.ndarray) -> Iterator[StreamChunk | Result]:
        row = self.rows[place]
        yield row.take(tokens.tolist(), log_probs.tolist())
        if row.finish_reason:
            self.rows[place] = None
            self.rules = None
            yield row.result()

    def _steps(self) -> int:
        """How many tokens to generate before the host looks: few if somebody watches, or text may end a row."""
        if self.streaming:
            return int(np.clip(STREAM_SECONDS / self.step_seconds, 1, MAX_STEPS))
        stopping = any(row.request.stop_strings for row in self.rows if row)
        return STEPS_BEFORE_STOP_STRINGS if stopping else MAX_STEPS

    def _reserve(self, length: int) -> None:
        """Makes the cache long enough for rows of `length` tokens."""
        needed = bucket(length, SMALLEST_CACHE)
        if self.state is None:
            self.slots = max(self.slots, needed)
            self.state = self.engine.call(
                programs.empty_state, ("empty", *self._shape()), self.engine.model.config, len(self.rows), self.slots
            )
        elif needed > self.slots:
            before, self.slots = self.slots, needed
            self.state = self.engine.call(
                programs.grow, ("grow", *self._shape(), f"from {before}"), self.state, self.slots
            )

    def _shape(self) -> tuple[str, str]:
        return f"{len(self.rows)} rows", f"{self.slots} slots"


def _check_params(params, expected) -> None:
    """Raises ValueError where `params` is not a tree of floating-point arrays of these shapes."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"the parameters have no {missing[0]} ({len(missing)} are missing): are they of this model?")
    if extra := [name for name in found if name not in wanted]:
        raise ValueError(f"the parameters have {extra[0]}, which the model has not: are they of this model?")
    for name, leaf in found.items():
        if tuple(leaf.shape) != wanted[name].shape:
            raise ValueError(
                f"parameter {name} is {list(leaf.shape)}, the model's configuration makes it {list(wanted[name].shape)}"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"parameter {name} is {leaf.dtype}, expected floating-point weights")
