"""The rows that are generated together."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.admission import Prompt, bucket, next_prompts, prefill_count, prompts_of_rows
from qwen_jax.inference.constraints import words
from qwen_jax.inference.images import Features, image_places
from qwen_jax.inference.prefix_cache import PrefixCache
from qwen_jax.inference.programs import MAX_STEPS, Programs, RowRules
from qwen_jax.inference.requests import Ranking, Request, StreamChunk
from qwen_jax.inference.row import Row
from qwen_jax.inference.sampling import RowSampling, SamplingConfig, TokenBias
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import InputEmbeddings

SMALLEST_CACHE, SMALLEST_BIAS = 64, 8
STEPS_BEFORE_STOP_STRINGS = 8
STREAM_SECONDS = 0.1


def sampling_of(requests: Sequence[Request | None], vocab_size: int) -> RowSampling:
    """Sampling of the rows of these requests; a row without one takes the most probable token."""
    sampling = RowSampling.of(
        [request.sampling if request else SamplingConfig() for request in requests],
        [request.seed if request else 0 for request in requests],
    )
    most = max(len(request.logit_bias) if request else 0 for request in requests)
    if not most:
        return sampling
    shape = (len(requests), bucket(most, SMALLEST_BIAS))
    bias = TokenBias(np.full(shape, vocab_size, np.int32), np.zeros(shape, np.float32))
    for row, request in enumerate(requests):
        if request and request.logit_bias:
            bias.ids[row, : len(request.logit_bias)] = list(request.logit_bias)
            bias.values[row, : len(request.logit_bias)] = list(request.logit_bias.values())
    return dataclasses.replace(sampling, bias=bias)


def rules_of(requests: Sequence[Request | None], vocab_size: int) -> RowRules:
    """The requests of rows as arrays; a row without one gets rules that do nothing."""
    width = bucket(max([8, *(len(request.stop_ids) for request in requests if request)]), 8)
    stop_ids = np.full((len(requests), width), -1, np.int32)
    for row, request in enumerate(requests):
        if request:
            stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    ends = [request.prompt_length + request.max_new_tokens if request else 1 for request in requests]
    return RowRules(sampling_of(requests, vocab_size), stop_ids, np.asarray(ends, np.int32))


def prompts_of(requests: Sequence[Request], size: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [rows, size], lengths int32 [rows]) of prompts, filled up at the end."""
    tokens = np.zeros((len(requests), size), np.int32)
    for row, request in enumerate(requests):
        # An id outside the vocabulary means that there is no token.
        tokens[row, : request.prompt_length] = request.prompt or config.vocab_size
    return tokens, np.asarray([request.prompt_length for request in requests], np.int32)


def _kind(sampling: RowSampling, top: bool) -> tuple[str, ...]:
    """What of the rules chooses the program, in words."""
    kinds = ["sampling" if sampling.temperature.any() else "greedy"]
    if sampling.bias is not None:
        kinds.append(f"{sampling.bias.ids.shape[1]} biases")
    if sampling.allowed is not None:
        kinds.append("constrained")
    if top:
        kinds.append("most likely tokens")
    return tuple(kinds)


def _constrained(sampling: RowSampling, rows: Sequence[Row | None], vocab_size: int) -> RowSampling:
    """The sampling of rows with what their constraints allow next."""
    if not any(row.constrained for row in rows if row):
        return sampling
    allowed = np.full((len(rows), words(vocab_size)), np.iinfo(np.uint32).max, np.uint32)
    for place, row in enumerate(rows):
        if row and (mask := row.allowed()) is not None:
            allowed[place] = mask
    return dataclasses.replace(sampling, allowed=allowed)


def _rankings(ranked, row: int, count: int) -> list[Ranking]:
    """The most probable tokens in the places of the first `count` tokens of a row; none where there are none."""
    if ranked is None:
        return []
    ids, log_probs = (part[row, :count].tolist() for part in ranked)
    return [tuple(zip(*both, strict=True)) for both in zip(ids, log_probs, strict=True)]


class Batch:
    """Rows of the devices that hold requests.

    Args:
      call: runs the programs.
      ways: into how many parts the mesh splits rows.
      rows: number of rows.
      steady: whether the number of steps must not depend on the time, as all processes of a job must take the same.
      prefixes: the prefix cache, or None.
      features: of pictures.
    """

    def __init__(
        self,
        call: Programs,
        config: ModelConfig,
        ways: int,
        rows: int,
        steady: bool,
        prefixes: PrefixCache | None,
        features: Features,
    ):
        self.call, self.config, self.ways, self.steady = call, config, ways, steady
        self.prefixes, self.features = prefixes, features
        self.rows: list[Row | None] = [None] * rows
        self.slots = SMALLEST_CACHE
        self.state = None
        self.rules = None  # made anew when a row changes
        self.step_seconds = STREAM_SECONDS

    @property
    def free(self) -> int:
        """Number of rows without a request."""
        return self.rows.count(None)

    @property
    def busy(self) -> int:
        """Number of rows with a request."""
        return len(self.rows) - self.free

    def release(self, row: Row) -> None:
        """Makes room in the place of `row`. Its state stays on the devices until a new request overwrites it."""
        assert row.place is not None  # it is in the batch
        self.rows[row.place] = None
        self.rules = None

    def widen(self, rows: int) -> None:
        """Adds rows, up to `rows` in all."""
        before = len(self.rows)
        if rows <= before:
            return
        self.rows += [None] * (rows - before)
        self.rules = None
        if self.state is not None:
            key = ("grow", *self._shape(), f"from {before} rows")
            self.state = self.call(programs.grow, key, self.state, rows, self.slots)

    def start(self, params, fresh: Sequence[Row]) -> list[StreamChunk]:
        """Computes the prompts of new requests, equal ones once, and puts the requests into free rows."""
        waiting = prompts_of_rows(fresh, self.ways)
        chunks = []
        while waiting:
            group = next_prompts(waiting, self.prefixes, self.ways)
            chunks += self._prefill(params, group)
            begun = {id(prompt.rows) for prompt in group}
            waiting = [prompt for prompt in waiting if id(prompt.rows) not in begun]
        return chunks

    def _prefill(self, params, prompts: list[Prompt]) -> list[StreamChunk]:
        cache, logits, seen, shape = self._compute(params, prompts)
        rows = [row for prompt in prompts for row in prompt.rows]
        of = [index for index, prompt in enumerate(prompts) for _ in prompt.rows]
        if len(rows) == len(prompts):
            count, of = len(logits), None
        else:
            count = bucket(-(-len(rows) // self.ways), 1) * self.ways
            of = np.asarray(of + of[-1:] * (count - len(of)), np.int32)
            shape += f", {count} times"
        # The last request repeats; its repetitions are written to the same place.
        filled = rows + rows[-1:] * (count - len(rows))
        lengths = np.asarray([row.request.prompt_length for row in filled], np.int32)
        sampling = sampling_of([row.request for row in filled], self.config.vocab_size)
        sampling = _constrained(sampling, filled, self.config.vocab_size)
        top = any(row.request.top_log_probs for row in rows)
        first, log_probs, ranked, seen = self.call(
            programs.first_tokens,
            ("first tokens", f"{count} rows of {len(logits)}", *_kind(sampling, top)),
            logits,
            seen,
            lengths,
            sampling,
            not sampling.temperature.any(),
            top,
            of,
        )
        free = [place for place, row in enumerate(self.rows) if row is None]
        for row, place in zip(rows, free, strict=False):
            row.place = place
        self._reserve(prompts[0].slots)
        self._count(rows)
        self.state = self.call(
            programs.insert,
            ("insert", *self._shape(), shape),
            self.state,
            cache,
            first,
            lengths,
            seen,
            np.asarray([row.place for row in filled], np.int32),
            of,
        )
        first, log_probs, ranked = jax.device_get((first, log_probs, ranked))
        if ranked is not None:
            ranked = [part[:, None] for part in ranked]
        for row, place in zip(rows, free, strict=False):
            self.rows[place] = row
        self.rules = None
        self._keep([prompt.rows[0] for prompt in prompts])
        return [
            self._take(row, first[i : i + 1], log_probs[i : i + 1], _rankings(ranked, i, 1))
            for i, row in enumerate(rows)
        ]

    def _compute(self, params, prompts: list[Prompt]):
        """(cache, logits, seen) as `programs.prefill` gives them, and the sizes of the cache in words."""
        size, slots, _ = prompts[0].shape
        count = prefill_count(len(prompts), size, self.ways)
        filled = prompts + prompts[-1:] * (count - len(prompts))
        tokens, lengths = prompts_of([prompt.request for prompt in filled], slots, self.config)
        embeddings = self._embeddings(params, prompts, tokens.shape) if prompts[0].embedded else None
        prefixes = None
        if size < slots:
            assert self.prefixes is not None  # it holds what is not computed
            prefixes = self.prefixes.prefixes([prompt.places for prompt in filled], tokens)
            places = np.asarray(prefixes.lengths)[:, None] + np.arange(size)
            tokens = np.take_along_axis(tokens, places, axis=1)
            if embeddings is not None:
                values, given = map(np.asarray, embeddings)
                values = np.take_along_axis(values, places[..., None], axis=1)
                embeddings = InputEmbeddings(values, np.take_along_axis(given, places, axis=1))
        for prompt in prompts:
            for number, row in enumerate(prompt.rows):
                row.cached_tokens = prompt.request.prompt_length if number else prompt.cached
                row.version = self.prefixes.version if self.prefixes is not None else 0
        shape = f"{count} x {slots} tokens"
        kind = f", the last {size} of them" * (prefixes is not None) + " with embeddings" * (embeddings is not None)
        result = self.call(
            programs.prefill, ("prefill", shape + kind), self.config, params, tokens, lengths, embeddings, prefixes
        )
        return *result, shape

    def _embeddings(self, params, prompts: Sequence[Prompt], shape: tuple[int, ...]) -> InputEmbeddings:
        """What stands for tokens of prompts, [*shape, hidden]; of pictures, those that are computed.

        Rows after those of `prompts` are filled up as `filled` is.
        """
        values = np.zeros((*shape, self.config.hidden_size), self.config.compute_dtype)
        embeddings = InputEmbeddings(values, np.zeros(shape, bool))
        images, spans = [], []
        for row, prompt in enumerate(prompts):
            request = prompt.request
            if request.embeddings is not None:
                assert request.embedding_positions is not None  # `check_request` fills them in
                places = list(request.embedding_positions)
                embeddings.values[row, places], embeddings.given[row, places] = request.embeddings, True
            elif request.images:
                assert self.config.vision is not None  # see `images.checked_images`
                for image, span in zip(request.images, image_places(request.prompt, self.config.vision), strict=True):
                    if span.stop > prompt.cached:
                        images.append(image)
                        spans.append((row, span))
        if images:
            for where, features in zip(spans, self.features.of(params, images), strict=True):
                embeddings.values[where], embeddings.given[where] = features, True
        for filled in embeddings:  # the last prompt repeats
            filled[len(prompts) :] = filled[len(prompts) - 1]
        return embeddings

    def _keep(self, rows: Sequence[Row]) -> None:
        """Copies what these rows have computed, without the last token of each, to the prefix cache."""
        if self.prefixes is None or self.state is None:
            return
        texts = [
            (row.place, row.request.prompt_length, (*row.key, *row.tokens[:-1]))
            for row in rows
            if row.request.embeddings is None and row.version == self.prefixes.version and row.place is not None
        ]
        self.prefixes.keep(self.state.cache.layers, self._shape(), texts)

    def proceed(self, params, waiting: bool) -> list[StreamChunk]:
        """Generates tokens for all rows; stops early when some have finished and others wait for room."""
        steps = self._steps()
        self._reserve(max(min(row.length + steps, row.end) for row in self.rows if row))
        if self.rules is None:
            self.rules = rules_of([row.request if row else None for row in self.rows], self.config.vocab_size)
        active = np.asarray([row is not None for row in self.rows])
        floor = max(self.busy - max(1, len(self.rows) // 8), 0) if waiting else 0
        sampling = _constrained(self.rules.sampling, self.rows, self.config.vocab_size)
        top = any(row.request.top_log_probs for row in self.rows if row)
        width = self.rules.stop_ids.shape[1]
        begun, known = time.perf_counter(), self.call.compilations
        self.state, tokens, log_probs, ranked, counts = self.call(
            programs.generate,
            ("generate", *self._shape(), *_kind(sampling, top), f"{width} stop ids"),
            self.config,
            params,
            self.state,
            active,
            dataclasses.replace(self.rules, sampling=sampling),
            np.int32(steps),
            np.int32(floor),
            not sampling.temperature.any(),
            top,
        )
        tokens, log_probs, ranked, counts = jax.device_get((tokens, log_probs, ranked, counts))
        if self.call.compilations == known:
            self.step_seconds = (time.perf_counter() - begun) / max(counts.max(), 1)
        rows = [row for row in self.rows if row is not None]
        places = [place for place, row in enumerate(self.rows) if row is not None]
        chunks = [
            self._take(
                row,
                tokens[place, : counts[place]],
                log_probs[place, : counts[place]],
                _rankings(ranked, place, counts[place]) if row.request.top_log_probs else (),
            )
            for row, place in zip(rows, places, strict=True)
        ]
        self._keep([row for row in rows if row.finish_reason])
        return chunks

    def _take(self, row: Row, tokens: np.ndarray, log_probs: np.ndarray, ranked: Sequence[Ranking]) -> StreamChunk:
        chunk = row.take(tokens.tolist(), log_probs.tolist(), ranked)
        if row.finish_reason:
            self.release(row)
        return chunk

    def _steps(self) -> int:
        """Number of tokens to generate before the host looks: few for streams, and where text may end a row.

        One where a constraint has to say after each token what may come.
        """
        if any(row.constrained for row in self.rows if row):
            return 1
        if any(row.streaming for row in self.rows if row):
            if self.steady:
                return STEPS_BEFORE_STOP_STRINGS
            return int(np.clip(STREAM_SECONDS / self.step_seconds, 1, MAX_STEPS))
        stopping = any(row.request.stop_strings for row in self.rows if row)
        return STEPS_BEFORE_STOP_STRINGS if stopping else MAX_STEPS

    def _reserve(self, length: int) -> None:
        """Makes the cache long enough for rows of `length` tokens."""
        needed = bucket(length, SMALLEST_CACHE)
        if self.state is None:
            self.slots = max(self.slots, needed)
            self.state = self.call(
                programs.empty_state, ("empty", *self._shape()), self.config, len(self.rows), self.slots
            )
        elif needed > self.slots:
            before, self.slots = self.slots, needed
            key = ("grow", *self._shape(), f"from {before} slots")
            self.state = self.call(programs.grow, key, self.state, len(self.rows), self.slots)

    def _count(self, fresh: Sequence[Row]) -> None:
        """Counts what rows generate as long as one of them has a penalty that goes by it; before `fresh` come in."""
        assert self.state is not None  # `_reserve` makes it
        rows = [*fresh, *(row for row in self.rows if row)]
        counts = any(row.request.sampling.counts for row in rows)
        if counts and self.state.counts is None:
            self.state = self.call(programs.begin_counts, ("count", *self._shape()), self.state)
        elif not counts and self.state.counts is not None:
            self.state = dataclasses.replace(self.state, counts=None)

    def _shape(self) -> tuple[str, ...]:
        """Sizes of the batch in words."""
        counted = ("counted",) if self.state is not None and self.state.counts is not None else ()
        return f"{len(self.rows)} rows", f"{self.slots} slots", *counted
