"""The rows that are generated together, and the requests in them."""

import time
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.programs import MAX_STEPS, Programs, RowRules
from qwen_jax.inference.requests import LENGTH, STOP_ID, STOP_STRING, Handle, Request, Result, StreamChunk
from qwen_jax.inference.sampling import RowSampling, SamplingConfig
from qwen_jax.inference.text import TextStream, token_bytes
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import InputEmbeddings

SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64
# Prompts that are computed at once, and how many tokens they may have together with their padding.
PREFILL_ROWS, PREFILL_TOKENS = (1, 4, 16), 8192
STEPS_BEFORE_STOP_STRINGS = 8
STREAM_SECONDS = 0.1


def bucket(length: int, smallest: int) -> int:
    """`length` rounded up to a power of two, so that few programs are compiled."""
    return max(smallest, 1 << (length - 1).bit_length())


def prefill_rows(size: int) -> int:
    """The largest number of prompts of `size` tokens to compute at once."""
    return max(count for count in PREFILL_ROWS if count == 1 or count * size <= PREFILL_TOKENS)


class Row:
    """One request from its submission to its end.

    Attributes:
      handle, tokenizer: of the request and the engine.
      streaming: whether its chunks should come often.
      inbox: where its chunks go.
      place: its row in the batch; None before it has one.
      finish_reason: None until it ends.
    """

    def __init__(self, handle: Handle, tokenizer, streaming: bool, inbox: deque):
        self.handle, self.tokenizer, self.streaming, self.inbox = handle, tokenizer, streaming, inbox
        self.place: int | None = None
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.behavior_log_probs: list[float] = []
        self.text = TextStream(handle.request.stop_strings) if tokenizer is not None else None
        self.finish_reason: str | None = None

    @property
    def request(self) -> Request:
        """The request."""
        return self.handle.request

    @property
    def length(self) -> int:
        """Number of positions so far."""
        return self.request.prompt_length + len(self.tokens)

    @property
    def end(self) -> int:
        """The largest number of positions that it may have."""
        return self.request.prompt_length + self.request.max_new_tokens

    def take(self, tokens: Sequence[int], log_probs: Sequence[tuple[float, float]]) -> StreamChunk:
        """Adds new tokens, up to the one that ends it; `log_probs` has the two of `next_tokens` for each."""
        before, text = len(self.tokens), ""
        for token, (log_prob, behavior) in zip(tokens, log_probs, strict=True):
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            self.behavior_log_probs.append(behavior)
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
            self.handle,
            tuple(self.tokens[before:]),
            tuple(self.log_probs[before:]),
            text if self.text is not None else None,
            self.finish_reason,
            self._result(self.finish_reason) if self.finish_reason else None,
        )

    def _result(self, finish_reason: str) -> Result:
        return Result(
            self.handle.index,
            self.request,
            tuple(self.tokens),
            np.asarray(self.log_probs, np.float32),
            np.asarray(self.behavior_log_probs, np.float32),
            self.text.text if self.text is not None else None,
            finish_reason,
        )


def sampling_of(requests: Sequence[Request | None]) -> RowSampling:
    """Sampling of the rows of these requests; a row without one takes the most probable token."""
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
    ends = [request.prompt_length + request.max_new_tokens if request else 1 for request in requests]
    return RowRules(sampling_of(requests), stop_ids, np.asarray(ends, np.int32))


def prompts_of(
    requests: Sequence[Request], size: int, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray, InputEmbeddings | None]:
    """(tokens int32 [rows, size], lengths int32 [rows], embeddings or None) of prompts, filled up at the end."""
    tokens = np.zeros((len(requests), size), np.int32)
    embeddings = None
    if any(request.embeddings is not None for request in requests):
        values = np.zeros((len(requests), size, config.hidden_size), config.compute_dtype)
        embeddings = InputEmbeddings(values, np.zeros((len(requests), size), bool))
    for row, request in enumerate(requests):
        # An id outside the vocabulary means that there is no token.
        tokens[row, : request.prompt_length] = request.prompt or config.vocab_size
        if embeddings is not None and request.embeddings is not None:
            assert request.embedding_positions is not None  # `check_request` fills them in
            places = list(request.embedding_positions)
            embeddings.values[row, places] = request.embeddings
            embeddings.given[row, places] = True
    return tokens, np.asarray([request.prompt_length for request in requests], np.int32), embeddings


def _kind(greedy: bool) -> str:
    return "greedy" if greedy else "sampling"


class Batch:
    """Rows of the devices that hold requests.

    Args:
      call: runs the programs.
      ways: into how many parts the mesh splits rows.
      rows: number of rows.
      steady: whether the number of steps must not depend on the time, as all processes of a job must take the same.
    """

    def __init__(self, call: Programs, config: ModelConfig, ways: int, rows: int, steady: bool):
        self.call, self.config, self.ways, self.steady = call, config, ways, steady
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
        """Computes the prompts of new requests and puts them into free rows."""
        groups: dict[tuple[int, bool], list[Row]] = {}
        for row in fresh:
            size = bucket(row.request.prompt_length, SMALLEST_PROMPT)
            groups.setdefault((size, row.request.embeddings is not None), []).append(row)
        chunks = []
        for (size, _), rows in sorted(groups.items()):
            most = prefill_rows(size) * self.ways
            for start in range(0, len(rows), most):
                chunks += self._prefill(params, size, rows[start : start + most])
        return chunks

    def _prefill(self, params, size: int, rows: list[Row]) -> list[StreamChunk]:
        count = next(count * self.ways for count in PREFILL_ROWS if count * self.ways >= len(rows))
        # The last request repeats; its repetitions are written to the same place.
        filled = rows + [rows[-1]] * (count - len(rows))
        requests = [row.request for row in filled]
        tokens, lengths, embeddings = prompts_of(requests, size, self.config)
        sampling = sampling_of(requests)
        shape = f"{count} x {size} tokens"
        cache, logits, seen = self.call(
            programs.prefill,
            ("prefill", shape, *["with embeddings"] * (embeddings is not None)),
            self.config,
            params,
            tokens,
            lengths,
            *[embeddings] * (embeddings is not None),
        )
        greedy = not sampling.temperature.any()
        first, log_probs, seen = self.call(
            programs.first_tokens,
            ("first tokens", f"{count} rows", _kind(greedy)),
            logits,
            seen,
            lengths,
            sampling,
            greedy,
        )
        free = [place for place, row in enumerate(self.rows) if row is None]
        for row, place in zip(rows, free, strict=False):
            row.place = place
        self._reserve(size)
        self.state = self.call(
            programs.insert,
            ("insert", *self._shape(), shape),
            self.state,
            cache,
            first,
            lengths,
            seen,
            np.asarray([row.place for row in filled], np.int32),
        )
        first, log_probs = jax.device_get((first, log_probs))
        for row, place in zip(rows, free, strict=False):
            self.rows[place] = row
        self.rules = None
        return [self._take(row, first[i : i + 1], log_probs[i : i + 1]) for i, row in enumerate(rows)]

    def proceed(self, params, waiting: bool) -> list[StreamChunk]:
        """Generates tokens for all rows; stops early when some have finished and others wait for room."""
        steps = self._steps()
        self._reserve(max(min(row.length + steps, row.end) for row in self.rows if row))
        if self.rules is None:
            self.rules = rules_of([row.request if row else None for row in self.rows])
        active = np.asarray([row is not None for row in self.rows])
        floor = max(self.busy - max(1, len(self.rows) // 8), 0) if waiting else 0
        greedy = not self.rules.sampling.temperature.any()
        width = self.rules.stop_ids.shape[1]
        begun, known = time.perf_counter(), self.call.compilations
        self.state, tokens, log_probs, counts = self.call(
            programs.generate,
            ("generate", *self._shape(), _kind(greedy), f"{width} stop ids"),
            self.config,
            params,
            self.state,
            active,
            self.rules,
            np.int32(steps),
            np.int32(floor),
            greedy,
        )
        tokens, log_probs, counts = jax.device_get((tokens, log_probs, counts))
        if self.call.compilations == known:
            self.step_seconds = (time.perf_counter() - begun) / max(counts.max(), 1)
        return [
            self._take(row, tokens[place, : counts[place]], log_probs[place, : counts[place]])
            for place, row in enumerate(self.rows)
            if row is not None
        ]

    def _take(self, row: Row, tokens: np.ndarray, log_probs: np.ndarray) -> StreamChunk:
        chunk = row.take(tokens.tolist(), log_probs.tolist())
        if row.finish_reason:
            self.release(row)
        return chunk

    def _steps(self) -> int:
        """Number of tokens to generate before the host looks: few for streams, and where text may end a row."""
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

    def _shape(self) -> tuple[str, str]:
        return f"{len(self.rows)} rows", f"{self.slots} slots"
