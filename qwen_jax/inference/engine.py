"""Generation for many prompts at once: a batch of rows, in which each finished one makes room for the next prompt.

Prompts are computed in buckets of lengths; then all rows decode together, many tokens for each look of the host. A row
has its own length, rules and random numbers, so its tokens do not depend on the rows beside it.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from qwen_jax.inference import scoring, weights
from qwen_jax.inference.admission import PREFILL_CHUNK, bucket
from qwen_jax.inference.batch import Batch
from qwen_jax.inference.images import Features, prompt_key
from qwen_jax.inference.prefix_cache import PrefixCache
from qwen_jax.inference.programs import BLOCK_TOKENS, Programs
from qwen_jax.inference.requests import Handle, Request, Result, Score, StreamChunk, check_request
from qwen_jax.inference.row import Row
from qwen_jax.inference.sampling import MOST_LIKELY
from qwen_jax.inference.sources import END, ReadAhead, ReadInStep
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import num_batch_shards


class Engine:
    """Generates continuations of prompts, and scores given ones.

    `submit` takes a request, `step` goes on with all of them and returns their new tokens, `cancel` ends one. Requests
    may come at any time. `generate` and `stream` stand on these. An engine belongs to one thread.

    Programs are compiled for powers of two: of prompt lengths, of the positions of the cache, and of rows, up to
    `slots`. Each is compiled once and logged. The cache grows with its longest row, and is freed with the last request.

    Requests with the same prompt that begin together compute it once. With a prefix cache, a request computes what is
    new in its prompt: what no request before it has begun with, in its prompt or its prompt and reply. Tokens are the
    same, as far as rounding lets them: other programs compute the keys then, as they do in other batches.

    The features of a picture are computed when its prompt is, and kept for the next prompts with this picture. In what
    prompts share, pictures count by their content.

    Where the mesh spans several processes, every process makes the same calls with the same requests in the same order,
    and each gets every result.

    Attributes:
      params: the weights as `unstack_layers` gives them, in the compute dtype.
      context_length: the largest number of tokens of a prompt and its continuation together.
    """

    def __init__(
        self,
        model: Qwen,
        params,
        tokenizer=None,
        mesh: Mesh | None = None,
        slots: int = 16,
        context_length: int | None = None,
        prefix_cache_tokens: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        """Prepares the weights, see `set_params`.

        Args:
          model, params: as `load_pretrained` returns them, or as a training state holds them.
          tokenizer: as `text.token_bytes` takes it; without one there is no text and are no stop strings.
          mesh: the devices, from `qwen_jax.sharding.make_mesh`: weights lie on them as in training, rows over `data`
            and `fsdp`, heads over `tensor`. None: one device.
          slots: the largest number of requests that are generated together.
          context_length: see above; by default the model's `inference_length`.
          prefix_cache_tokens: tokens of prompts and replies whose keys and values stay on the devices, those that were
            used longest ago making room. 0: none do. Where the mesh splits rows, every part has all of them.
          prefill_chunk: a power of two. Longer prompts are computed in chunks of so many tokens, between which other
            requests go on.

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
        if not isinstance(prefix_cache_tokens, int) or 0 != prefix_cache_tokens < BLOCK_TOKENS:
            raise ValueError(
                f"prefix_cache_tokens must be 0 (no prefix cache) or at least {BLOCK_TOKENS}, "
                f"found {prefix_cache_tokens!r}"
            )
        if not isinstance(prefill_chunk, int) or prefill_chunk < BLOCK_TOKENS or prefill_chunk.bit_count() != 1:
            raise ValueError(
                f"prefill_chunk must be a power of two of at least {BLOCK_TOKENS} tokens, found {prefill_chunk!r}"
            )
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        self.context_length = context_length or config.inference_length
        self.ways = num_batch_shards(mesh) if mesh is not None else 1
        self.slots = -(-slots // self.ways) * self.ways
        self._several = mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1
        self._chunk = prefill_chunk
        self._call = Programs(mesh)
        self._prefixes = PrefixCache(self._call, config, prefix_cache_tokens) if prefix_cache_tokens else None
        self._features = Features(self._call, config, self.ways)
        self._batch: Batch | None = None
        self._rows: dict[Handle, Row] = {}  # of every request that has not ended
        self._waiting: deque[Row] = deque()
        self._sources = 0  # iterables that requests may still come from
        self._outbox: deque[StreamChunk] = deque()
        self._numbers = itertools.count()
        self.set_params(params)

    def set_params(self, params) -> None:
        """Goes on with other weights of the same model; no program is compiled anew.

        An array that has the compute dtype and lies where the engine needs it is shared with the caller, not copied;
        stacked layers are copied, block by block. A caller that donates shared arrays to another program, as a train
        step does, sets the new ones before it uses the engine again. Requests under way keep their keys; the prefix
        cache is emptied.

        Args:
          params: as in `Engine`, or those of an engine.

        Raises:
          ValueError: they are not of this model.
        """
        self.params = weights.prepare(self.model, params, self._call)
        self._features.clear()
        self.clear_prefix_cache()

    def clear_prefix_cache(self) -> None:
        """Frees what the prefix cache holds on the devices; new requests fill it again."""
        if self._prefixes is not None:
            self._prefixes.clear()

    @property
    def compilations(self) -> int:
        """Number of programs that have been compiled."""
        return self._call.compilations

    @property
    def live(self) -> int:
        """Number of requests that have not ended, or whose last chunk `step` has not returned yet."""
        return len(self._rows) + sum(chunk.finish_reason is not None for chunk in self._outbox)

    def submit(self, request: Request, *, streaming: bool = False) -> Handle:
        """Takes a request, which the next `step` begins if there is room, else a later one.

        Args:
          streaming: whether a user watches: during such a request, `step` returns about every tenth of a second instead
            of every 32 tokens.

        Raises:
          ValueError: see `check_request`.
        """
        handle = Handle(next(self._numbers), self._checked(request, None))
        self._admit(handle, streaming, self._outbox)
        return handle

    def step(self) -> list[StreamChunk]:
        """Goes on with all requests and returns their new tokens, which are none if there is no request, or none but
        long prompts that are being computed.

        The last chunk of a request has its `finish_reason` and its `result`. Chunks of `generate` and `stream` are not
        among them. An error, KeyboardInterrupt too, ends all requests.
        """
        self._advance()
        chunks = list(self._outbox)
        self._outbox.clear()
        return chunks

    def cancel(self, handle: Handle) -> bool:
        """Ends a request: its row is free for the next step, and no further chunk of it comes.

        Returns:
          Whether it was still under way.
        """
        row = self._rows.pop(handle, None)
        if row is None:
            return False
        if row.place is None:
            self._waiting.remove(row)
        else:
            assert self._batch is not None  # it holds the row
            self._batch.release(row)
        kept = [chunk for chunk in row.inbox if chunk.handle is not handle]
        row.inbox.clear()
        row.inbox.extend(kept)
        self._free_idle()
        return True

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results in the order in which they finish; `Result.index` is the place of a request.

        Closing the iterator cancels unfinished requests.

        Args:
          requests: a sequence is checked as a whole before anything is computed. Anything else is read, in a thread of
            its own, as rows become free: it may have no end, and may wait between two requests while the engine
            generates for earlier ones. (Where the mesh spans several processes, it is read in step with the rows.)

        Raises:
          ValueError: see `check_request`; the message has the index of the request.
        """
        if not isinstance(requests, Sequence):
            return self._results_of_any(requests)
        handles = [Handle(index, self._checked(request, index)) for index, request in enumerate(requests)]
        return self._results(handles)

    def stream(self, request: Request) -> Iterator[StreamChunk]:
        """One continuation in chunks, as it comes. Closing the iterator cancels it.

        Raises:
          ValueError: see `check_request`.
        """
        return self._chunks([Handle(next(self._numbers), self._checked(request, None))], streaming=True)

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        images: Sequence[Sequence[np.ndarray]] | None = None,
        top_log_probs: int = 0,
    ) -> list[Score]:
        """Log-probabilities of given continuations, in the order given.

        Those of the softmax of the logits, without temperature: up to the training length equal to a training-mode
        forward pass. Dynamic NTK goes by the length of prompt and continuation together, without the last token, which
        the model does not read.

        Tokens with which several texts begin are computed once, within a call: pass all continuations of a prompt, and
        all prompts with the same examples before the question, together. Their order does not matter.

        Args:
          prompts: token ids of each, at least one.
          continuations: token ids of the continuation of each, at least one. Prompt and continuation together may have
            one token more than `context_length`.
          images: the pictures of each prompt, as in `Request`; None: no prompt has any.
          top_log_probs: how many of the most probable tokens are told in the place of each token, 0 to 20. With any,
            other programs compute the scores, which may differ in rounding.

        Raises:
          ValueError: naming the pair that is empty, too long, or not of the model's ids, or whose pictures do not fit;
            or `top_log_probs` is no integer, or out of range.
        """
        if not isinstance(top_log_probs, int | np.integer) or not 0 <= top_log_probs <= MOST_LIKELY:
            raise ValueError(f"top_log_probs must be an integer from 0 to {MOST_LIKELY}, found {top_log_probs!r}")
        config = self.model.config
        pictures = scoring.Pictures(config, lambda images: self._features.of(self.params, images))
        pairs = scoring.checked_pairs(
            prompts, continuations, images, pictures, config, self.context_length, self._length_rule
        )
        return scoring.score(self._call, config, self.params, self.ways, pairs, pictures, int(top_log_probs))

    def _checked(self, request: Request, index: int | None) -> Request:
        try:
            return check_request(request, self.model.config, self.context_length, self._length_rule, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"request {index}: {error}" if index is not None else str(error)) from error

    def _admit(self, handle: Handle, streaming: bool, inbox: deque) -> None:
        request = handle.request
        key = prompt_key(request.prompt, request.images, self.model.config.vision)
        row = Row(handle, self.tokenizer, streaming, inbox, key)
        self._rows[handle] = row
        self._waiting.append(row)

    def _advance(self) -> None:
        """One round: computes prompts of waiting requests where rows are free, then generates; delivers the chunks.

        Of long prompts it computes about one chunk, so that the others need not wait for the whole. A round that begins
        the first requests, of a watching user, ends with their first tokens.
        """
        if not self._rows:
            return
        try:
            batch = self._batch_for(len(self._rows))
            fresh = [self._waiting.popleft() for _ in range(min(batch.free, len(self._waiting)))]
            batch.start(fresh)
            alone = not batch.active.any()
            begun = batch.read(self.params)
            # Who watches, and keeps nobody waiting, gets the first token before the program of the others is compiled.
            watched = alone and any(self._rows[chunk.handle].streaming for chunk in begun)
            self._deliver(begun)
            if batch.active.any() and not watched:
                self._deliver(batch.proceed(self.params, bool(self._waiting)))
        except BaseException:
            # The arrays on the devices may be half updated.
            self._batch = None
            self._rows.clear()
            self._waiting.clear()
            self.clear_prefix_cache()
            raise
        self._free_idle()

    def _batch_for(self, requests: int) -> Batch:
        """The batch with enough rows for so many requests, as far as `slots` go."""
        wanted = self.slots if self._sources else min(self.slots, bucket(requests, 1))
        wanted = -(-wanted // self.ways) * self.ways
        if self._batch is None:
            self._batch = Batch(
                self._call,
                self.model.config,
                self.ways,
                wanted,
                self._several,
                self._prefixes,
                self._features,
                self._chunk,
            )
        self._batch.widen(wanted)
        return self._batch

    def _deliver(self, chunks: Iterable[StreamChunk]) -> None:
        for chunk in chunks:
            self._rows[chunk.handle].inbox.append(chunk)
            if chunk.finish_reason:
                del self._rows[chunk.handle]

    def _free_idle(self) -> None:
        if not self._rows:
            self._batch = None

    def _chunks(self, handles: Sequence[Handle], streaming: bool = False) -> Generator[StreamChunk]:
        """Submits requests and yields their chunks, whoever steps meanwhile."""
        inbox: deque[StreamChunk] = deque()
        unfinished = dict.fromkeys(handles)
        for handle in handles:
            self._admit(handle, streaming, inbox)
        try:
            while unfinished:
                self._fill(inbox, unfinished)
                chunk = inbox.popleft()
                if chunk.finish_reason:
                    del unfinished[chunk.handle]
                yield chunk
        finally:
            for handle in unfinished:
                self.cancel(handle)

    def _fill(self, inbox: deque, unfinished: dict[Handle, None]) -> None:
        """Steps until there is a chunk of one of these requests."""
        while not inbox:
            if next(iter(unfinished)) not in self._rows:
                raise RuntimeError("an error in another call of this engine ended the requests of this one")
            self._advance()

    def _results(self, handles: Sequence[Handle]) -> Iterator[Result]:
        with contextlib.closing(self._chunks(handles)) as chunks:
            for chunk in chunks:
                if chunk.result is not None:
                    yield chunk.result

    def _results_of_any(self, requests: Iterable[Request]) -> Iterator[Result]:
        ahead = max(self.slots // 8, 1)
        source = ReadInStep(requests) if self._several else ReadAhead(requests, ahead)
        inbox: deque[StreamChunk] = deque()
        unfinished: dict[Handle, None] = {}
        self._sources += 1
        ended, numbers = False, itertools.count()
        try:
            while True:
                # Some more than there are rows, so that a row is refilled as soon as it is free.
                while not ended and len(unfinished) < self.slots + ahead:
                    request = source.take(wait=not unfinished)
                    if request is None:
                        break
                    ended = request is END
                    if not ended:
                        index = next(numbers)
                        handle = Handle(index, self._checked(request, index))
                        unfinished[handle] = None
                        self._admit(handle, False, inbox)
                if not unfinished:
                    return
                self._fill(inbox, unfinished)
                chunk = inbox.popleft()
                if chunk.result is not None:
                    del unfinished[chunk.handle]
                    yield chunk.result
        finally:
            source.close()
            self._sources -= 1
            for handle in unfinished:
                self.cancel(handle)
