"""The rows that are generated together."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from qwen_jax.inference import long_prompts, programs
from qwen_jax.inference.admission import (
    SMALLEST_CHUNK,
    Prompt,
    bucket,
    next_prompts,
    prefill_count,
    prompts_of_rows,
)
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
# Tokens that rows generate between two chunks of another one's prompt.
STEPS_BETWEEN_CHUNKS = 8
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


class _Vectors(NamedTuple):
    """What stands for tokens of a prompt: `values` [n, hidden] at the positions `places` [n]."""

    places: np.ndarray
    values: np.ndarray


@dataclasses.dataclass
class _Reading:
    """A long prompt that is being computed.

    Attributes:
      tokens: int32 [...], the prompt, filled up at the end.
      place: the row of the batch that gets its keys and values.
      done: how many of its tokens have theirs.
      vectors: in the place of tokens' embeddings.
    """

    prompt: Prompt
    tokens: np.ndarray
    place: int
    done: int
    vectors: _Vectors


class Batch:
    """Rows of the devices that hold requests.

    Args:
      call: runs the programs.
      ways: into how many parts the mesh splits rows.
      rows: number of rows.
      steady: whether the number of steps must not depend on the time, as all processes of a job must take the same.
      prefixes: the prefix cache, or None.
      features: of pictures.
      chunk: longer prompts are computed in chunks of so many tokens.
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
        chunk: int,
    ):
        self.call, self.config, self.ways, self.steady = call, config, ways, steady
        self.prefixes, self.features, self.chunk = prefixes, features, chunk
        self.waiting: list[Prompt] = []  # their rows have places, and nothing is computed
        self.reading: list[_Reading] = []
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

    @property
    def active(self) -> np.ndarray:
        """Bool [rows], which rows have a request whose prompt is computed."""
        unread = {row.place for prompt in self._unread() for row in prompt.rows}
        return np.asarray([row is not None and place not in unread for place, row in enumerate(self.rows)])

    def _unread(self) -> list[Prompt]:
        return [*self.waiting, *(reading.prompt for reading in self.reading)]

    def release(self, row: Row) -> None:
        """Makes room in the place of `row`. Its state stays on the devices until a new request overwrites it."""
        place = row.place
        assert place is not None  # it is in the batch
        for prompt in self._unread():
            if row in prompt.rows:
                prompt.rows.remove(row)
        for reading in self.reading:
            if reading.place == place and reading.prompt.rows:
                # Another request needs the prompt that is computed here: it takes the place.
                heir = reading.prompt.rows[0]
                assert heir.place is not None  # as above
                place, heir.place = heir.place, place
                self.rows[heir.place] = heir
        self.waiting = [prompt for prompt in self.waiting if prompt.rows]
        self.reading = [reading for reading in self.reading if reading.prompt.rows]
        self.rows[place] = None
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

    def start(self, fresh: Sequence[Row]) -> None:
        """Puts new requests into free rows; `read` computes their prompts."""
        free = [place for place, row in enumerate(self.rows) if row is None]
        for row, place in zip(fresh, free, strict=False):
            row.place = place
            self.rows[place] = row
        self.rules = None
        self.waiting += prompts_of_rows(fresh, self.ways)

    def read(self, params) -> list[StreamChunk]:
        """Computes prompts of requests: all short ones, equal ones once, and of the long ones about a chunk.

        Returns:
          The first tokens of requests whose prompts are computed.
        """
        chunks = []
        spent = 0
        while self.waiting or self.reading:
            if self.waiting:
                group = next_prompts(self.waiting, self.prefixes, self.ways, self.chunk)
                begun = {id(prompt.rows) for prompt in group}
                if not group[0].long:
                    self.waiting = [prompt for prompt in self.waiting if id(prompt.rows) not in begun]
                    chunks += self._prefill(params, group)
                    continue
                if not self.reading:
                    self.waiting = [prompt for prompt in self.waiting if id(prompt.rows) not in begun]
                    self._open(params, group)
            if spent >= self.chunk:
                break
            size, found = self._read_on(params)
            spent += size
            chunks += found
        return chunks

    def _prefill(self, params, prompts: list[Prompt]) -> list[StreamChunk]:
        cache, logits, seen, shape = self._compute(params, prompts)
        one_each = len(prompts) == sum(len(prompt.rows) for prompt in prompts)
        rows, first, lengths, seen, of = self._first_tokens(
            logits, seen, dict(enumerate(prompts)), len(logits) if one_each else None
        )
        self._reserve(prompts[0].slots)
        self._count()
        self.state = self.call(
            programs.insert,
            ("insert", *self._shape(), shape + f", {len(lengths)} times" * (of is not None)),
            self.state,
            cache,
            first[0],
            lengths,
            seen,
            self._places(rows, len(lengths)),
            of,
        )
        return self._begun([prompt.rows[0] for prompt in prompts], rows, first)

    def _first_tokens(self, logits, seen, prompts: dict[int, Prompt], count: int | None = None):
        """Draws the first token of each request.

        Args:
          logits, seen: of some prompts; `prompts` has the requests by their rows.
          count: number of requests with padding, each the only one of the prompt in its row; None: otherwise.

        Returns:
          (requests; token, log-probabilities and most likely tokens of each; length of the prompt, `seen`, and row in
          `logits` of each, the last None if it is the request's own): all with padding.
        """
        rows = [row for prompt in prompts.values() for row in prompt.rows]
        of = None
        if count is None:
            count = bucket(-(-len(rows) // self.ways), 1) * self.ways
            found = [index for index, prompt in prompts.items() for _ in prompt.rows]
            of = np.asarray(found + found[-1:] * (count - len(found)), np.int32)
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
        return rows, (first, log_probs, ranked), lengths, seen, of

    def _places(self, rows: Sequence[Row], count: int) -> np.ndarray:
        """Places of requests, the last one repeated up to `count`."""
        places = [row.place for row in rows]
        return np.asarray(places + places[-1:] * (count - len(places)), np.int32)

    def _begun(self, computed: list[Row], rows: Sequence[Row], first) -> list[StreamChunk]:
        """The first tokens of requests that are in the batch now; `computed` has one of each prompt."""
        tokens, log_probs, ranked = jax.device_get(first)
        if ranked is not None:
            ranked = [part[:, None] for part in ranked]
        self.rules = None
        self._keep(computed)
        return [
            self._take(row, tokens[i : i + 1], log_probs[i : i + 1], _rankings(ranked, i, 1))
            for i, row in enumerate(rows)
        ]

    def _open(self, params, prompts: list[Prompt]) -> None:
        """Makes room for long prompts, and puts what the prefix cache has of them into their rows."""
        ends = [(row.length, row.end) for prompt in prompts for row in prompt.rows]
        self._reserve(max(min(length + MAX_STEPS, end) for length, end in ends))
        # There may be more slots before the last chunk.
        tokens, _ = prompts_of([prompt.request for prompt in prompts], self.slots + self.chunk, self.config)
        self._count_cached(prompts)
        self.reading = [
            _Reading(prompt, text, self._place(prompt), prompt.cached, vectors)
            for prompt, text, vectors in zip(prompts, tokens, self._vectors(params, prompts), strict=True)
        ]
        if any(prompt.cached for prompt in prompts):
            assert self.prefixes is not None  # it holds them
            filled = prompts + prompts[-1:] * (self.ways - len(prompts))
            places = np.asarray([self._place(prompt) for prompt in filled], np.int32)
            found = self.prefixes.prefixes([prompt.places for prompt in filled], tokens[:, : self.slots])
            self.state = self.call(
                long_prompts.paste,
                ("paste", *self._shape()),
                self.state,
                found.pool,
                places,
                found.blocks,
                found.lengths,
            )

    @staticmethod
    def _place(prompt: Prompt) -> int:
        place = prompt.rows[0].place
        assert place is not None  # `start` gave it one
        return place

    def _read_on(self, params) -> tuple[int, list[StreamChunk]]:
        """Computes the next chunk of the long prompts.

        Returns:
          (number of its tokens, the first tokens of the requests whose prompts end with it).
        """
        left = max(reading.prompt.request.prompt_length - reading.done for reading in self.reading)
        size = min(bucket(left, min(SMALLEST_CHUNK, self.chunk)), self.chunk)
        filled = self.reading + self.reading[-1:] * (self.ways - len(self.reading))
        # A last chunk that would reach past the slots computes some tokens again.
        starts = np.asarray([min(reading.done, self.slots - size) for reading in filled], np.int32)
        tokens = np.stack([reading.tokens[start:][:size] for reading, start in zip(filled, starts, strict=True)])
        lengths = np.asarray([reading.prompt.request.prompt_length for reading in filled], np.int32)
        embeddings = self._between([reading.vectors for reading in filled], starts, size)
        kind = " with embeddings" * (embeddings is not None)
        self.state, logits = self.call(
            long_prompts.extend,
            ("extend", *self._shape(), f"{len(filled)} x {size} tokens{kind}"),
            self.config,
            params,
            self.state,
            tokens,
            np.asarray([reading.place for reading in filled], np.int32),
            starts,
            lengths,
            embeddings,
        )
        ended = {}
        for index, (reading, start) in enumerate(zip(self.reading, starts.tolist(), strict=False)):
            reading.done = start + size
            if reading.done >= reading.prompt.request.prompt_length:
                ended[index] = reading
        if not ended:
            return size, []
        self.reading = [reading for index, reading in enumerate(self.reading) if index not in ended]
        return size, self._begin(logits, ended)

    def _begin(self, logits, ended: dict[int, _Reading]) -> list[StreamChunk]:
        """Begins the requests of long prompts that are computed; `logits` has those of each in its row."""
        seen = np.zeros((len(logits), self.config.vocab_size), bool)
        for index, reading in ended.items():
            ids = reading.tokens[: reading.prompt.request.prompt_length]
            seen[index, ids[ids < self.config.vocab_size]] = True
        prompts = {index: reading.prompt for index, reading in ended.items()}
        rows, first, lengths, seen, _ = self._first_tokens(logits, seen, prompts)
        sources = None
        if len(rows) > len(ended):
            found = [reading.place for reading in ended.values() for _ in reading.prompt.rows]
            sources = np.asarray(found + found[-1:] * (len(lengths) - len(found)), np.int32)
        self._count()
        self.state = self.call(
            long_prompts.begin,
            ("begin", *self._shape(), f"{len(lengths)} rows" + " with copies" * (sources is not None)),
            self.state,
            first[0],
            lengths,
            seen,
            self._places(rows, len(lengths)),
            sources,
        )
        return self._begun([prompt.rows[0] for prompt in prompts.values()], rows, first)

    def _compute(self, params, prompts: list[Prompt]):
        """(cache, logits, seen) as `programs.prefill` gives them, and the sizes of the cache in words."""
        size, slots = prompts[0].size, prompts[0].slots
        count = prefill_count(len(prompts), size, self.ways)
        filled = prompts + prompts[-1:] * (count - len(prompts))
        tokens, lengths = prompts_of([prompt.request for prompt in filled], slots, self.config)
        starts = np.asarray([prompt.cached for prompt in filled], np.int32)
        embeddings = None
        if prompts[0].embedded:
            vectors = self._vectors(params, prompts)
            embeddings = self._between(vectors + vectors[-1:] * (count - len(prompts)), starts, size)
        prefixes = None
        if size < slots:
            assert self.prefixes is not None  # it holds what is not computed
            prefixes = self.prefixes.prefixes([prompt.places for prompt in filled], tokens)
            tokens = np.take_along_axis(tokens, starts[:, None] + np.arange(size), axis=1)
        self._count_cached(prompts)
        shape = f"{count} x {slots} tokens"
        kind = f", the last {size} of them" * (prefixes is not None) + " with embeddings" * (embeddings is not None)
        result = self.call(
            programs.prefill, ("prefill", shape + kind), self.config, params, tokens, lengths, embeddings, prefixes
        )
        return *result, shape

    def _count_cached(self, prompts: Sequence[Prompt]) -> None:
        """Notes in the requests of prompts how much of these is there already."""
        for prompt in prompts:
            for number, row in enumerate(prompt.rows):
                row.cached_tokens = prompt.request.prompt_length if number else prompt.cached
                row.version = self.prefixes.version if self.prefixes is not None else 0

    def _vectors(self, params, prompts: Sequence[Prompt]) -> list[_Vectors]:
        """What stands for tokens of each prompt; of pictures, those that are computed."""
        images, spans = [], []  # of all prompts, so that they are encoded together
        for prompt in prompts:
            request = prompt.request
            if request.images and request.embeddings is None:
                assert self.config.vision is not None  # see `images.checked_images`
                for image, span in zip(request.images, image_places(request.prompt, self.config.vision), strict=True):
                    # The last chunk of a long prompt may begin before.
                    if span.stop > prompt.cached - (self.chunk if prompt.long else 0):
                        images.append(image)
                        spans.append((prompt, span))
        features = self.features.of(params, images) if images else []
        found = []
        for prompt in prompts:
            request = prompt.request
            if request.embeddings is not None:
                assert request.embedding_positions is not None  # `check_request` fills them in
                found.append(_Vectors(np.asarray(request.embedding_positions, int), np.asarray(request.embeddings)))
                continue
            own = [(span, values) for (of, span), values in zip(spans, features, strict=True) if of is prompt]
            places = [np.zeros(0, int), *(np.arange(span.start, span.stop) for span, _ in own)]
            none = np.zeros((0, self.config.hidden_size), self.config.compute_dtype)
            found.append(_Vectors(np.concatenate(places), np.concatenate([none, *(values for _, values in own)])))
        return found

    def _between(self, vectors: Sequence[_Vectors], starts: np.ndarray, size: int) -> InputEmbeddings | None:
        """What of `vectors` stands at `size` positions of each row from `starts` [rows] on; None: nothing does."""
        given = np.zeros((len(starts), size), bool)
        inside = []
        for row, (of, start) in enumerate(zip(vectors, starts, strict=True)):
            here = (of.places >= start) & (of.places < start + size)
            inside.append((row, of.places[here] - start, of.values[here]))
            given[row, inside[-1][1]] = True
        if not given.any():
            return None
        values = np.zeros((*given.shape, self.config.hidden_size), self.config.compute_dtype)
        for row, places, found in inside:
            values[row, places] = found
        return InputEmbeddings(values, given)

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
        active = self.active
        places = np.flatnonzero(active).tolist()
        going_on = [row if on else None for row, on in zip(self.rows, active, strict=True)]
        rows = [row for row in going_on if row is not None]
        steps = self._steps(rows)
        self._reserve(max(min(row.length + steps, row.end) for row in rows))
        if self.rules is None:
            self.rules = rules_of([row.request if row else None for row in self.rows], self.config.vocab_size)
        floor = max(len(rows) - max(1, len(self.rows) // 8), 0) if waiting else 0
        sampling = _constrained(self.rules.sampling, going_on, self.config.vocab_size)
        top = any(row.request.top_log_probs for row in rows)
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

    def _steps(self, rows: Sequence[Row]) -> int:
        """Number of tokens to generate before the host looks: few for streams, and where text may end a row.

        One where a constraint has to say after each token what may come.
        """
        if any(row.constrained for row in rows):
            return 1
        most = STEPS_BETWEEN_CHUNKS if self.waiting or self.reading else MAX_STEPS
        if any(row.streaming for row in rows):
            if self.steady:
                return STEPS_BEFORE_STOP_STRINGS
            return int(np.clip(STREAM_SECONDS / self.step_seconds, 1, most))
        stopping = any(row.request.stop_strings for row in rows)
        return min(STEPS_BEFORE_STOP_STRINGS, most) if stopping else most

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

    def _count(self) -> None:
        """Counts what rows generate as long as one of them has a penalty that goes by it; before new ones begin."""
        assert self.state is not None  # `_reserve` makes it
        counts = any(row.request.sampling.counts for row in self.rows if row)
        if counts and self.state.counts is None:
            self.state = self.call(programs.begin_counts, ("count", *self._shape()), self.state)
        elif not counts and self.state.counts is not None:
            self.state = dataclasses.replace(self.state, counts=None)

    def _shape(self) -> tuple[str, ...]:
        """Sizes of the batch in words."""
        counted = ("counted",) if self.state is not None and self.state.counts is not None else ()
        return f"{len(self.rows)} rows", f"{self.slots} slots", *counted
