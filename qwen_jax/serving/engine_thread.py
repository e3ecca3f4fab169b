"""One thread that owns the engine, and the queue between it and an event loop.

An engine belongs to one thread, and a step of it takes as long as the devices need. Requests come from an event loop
and their chunks go back to it, each submission to its own queue, so that no client waits for the reading of another.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from qwen_jax.inference import Engine, Handle, Request, StreamChunk
from qwen_jax.inference.requests import Score
from qwen_jax.serving.scoring import empty_chunk, first_prompts, score_prompts

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no room for a submission now."""


class Stopped(Exception):
    """The thread takes no more submissions, or has ended this one."""


class EngineFailed(Exception):
    """An error in the engine ended the submission."""


class Submission:
    """Requests that were submitted together; an asynchronous iterator over (place in the submission, chunk).

    It ends after the last chunk of each request. One coroutine reads it, in the event loop that submitted it.

    Attributes:
        requests: the requests.
        scores: of the tokens of the prompt after its first, by the place of the request, where they are asked for. A
            score is there when the first chunk of the request is.
    """

    def __init__(self, thread: "EngineThread", requests: Sequence[Request], streaming: bool, scored: int | None):
        self.requests = tuple(requests)
        self.streaming, self.scored = streaming, scored
        self.scores: dict[int, Score] = {}
        self.places: dict[Handle, int] = {}  # the thread's own, of those that have not ended
        self._thread, self._loop = thread, asyncio.get_running_loop()
        self._inbox: asyncio.Queue[list[tuple[int, StreamChunk]] | Exception] = asyncio.Queue()
        self._ready: deque[tuple[int, StreamChunk]] = deque()
        self._open = len(self.requests)

    def __aiter__(self) -> "Submission":
        return self

    async def __anext__(self) -> tuple[int, StreamChunk]:
        if not self._open:
            raise StopAsyncIteration
        while not self._ready:
            item = await self._inbox.get()
            if isinstance(item, Exception):
                self._open = 0
                raise item
            self._ready.extend(item)
        place, chunk = self._ready.popleft()
        self._open -= chunk.finish_reason is not None
        return place, chunk

    def cancel(self) -> None:
        """Ends what has not ended; its rows are free for the next step. Safe to call at any time, also again."""
        self._open = 0
        self._thread.cancel(self)

    def deliver(self, item: list[tuple[int, StreamChunk]] | Exception) -> None:
        """Puts chunks, or the error that ends the submission, into its queue; called by the thread."""
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, item)
        except RuntimeError:
            log.debug("the event loop of a submission is closed")


class EngineThread:
    """Runs an engine.

    Args:
        engine: an `Engine`, or anything with its `slots`, `submit`, `step`, `cancel` and `score`. No other thread uses
            it from `start` to the end of `stop`.
        max_waiting: the largest number of requests that may wait for a row.
    """

    def __init__(self, engine: Engine, max_waiting: int):
        self.engine, self.max_waiting = engine, max_waiting
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._live: dict[Handle, Submission] = {}  # the thread's own
        self._scoring: dict[Submission, None] = {}  # the thread's own, in their order
        self._open: dict[Submission, int] = {}  # how many requests of each have not ended
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def open(self) -> int:
        """Number of requests that have not ended."""
        with self._changed:
            return sum(self._open.values())

    @property
    def stopping(self) -> bool:
        """Whether it takes no more submissions: `stop` was called, or an error ended the thread."""
        with self._changed:
            return self._stopping

    @property
    def rows_in_use(self) -> int:
        """Number of requests that are generated, as far as there are rows."""
        return min(self.open, self.engine.slots)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return max(self.open - self.engine.slots, 0)

    @property
    def capacity(self) -> int:
        """The largest number of requests that can be open at once."""
        return self.engine.slots + self.max_waiting

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, requests: Sequence[Request], *, streaming: bool, scored: int | None = None) -> Submission:
        """Submits requests together, from a running event loop.

        Args:
            requests: of which `check_request` would find nothing wrong; the iterator raises what it finds. Those whose
                `max_new_tokens` is 0 generate nothing, and have one chunk.
            streaming: whether a user watches, see `Engine.submit`.
            scored: how many of the most probable tokens the scores of the prompts tell; None: prompts are not scored.

        Raises:
            QueueFull: there is no room for all of them now.
            Stopped: `stop` was called.
        """
        submission = Submission(self, requests, streaming, scored)
        with self._changed:
            if self._stopping:
                raise Stopped
            if sum(self._open.values()) + len(submission.requests) > self.capacity:
                raise QueueFull
            self._open[submission] = len(submission.requests)
            self._commands.append(lambda: self._begin(submission))
            self._changed.notify()
        return submission

    def cancel(self, submission: Submission) -> None:
        """See `Submission.cancel`."""
        with self._changed:
            if submission in self._open:
                self._commands.append(lambda: self._end(submission))
                self._changed.notify()

    def stop(self) -> None:
        """Ends all submissions, whose iterators raise `Stopped`, and the thread, after the step that it is in."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            log.exception("the thread of the engine failed; nothing is generated any more")
            with self._changed:
                self._stopping = True
                submissions = list(self._open)
                self._open.clear()
            for submission in submissions:
                submission.deliver(Stopped())

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._commands or self._live or self._scoring or self._stopping)
                commands, self._commands = self._commands, deque()
                stopping = self._stopping
            while commands:  # none is kept: it holds a submission
                commands.popleft()()
            if stopping:
                self._end_all(Stopped())
                return
            if self._scoring:
                self._score(next(iter(self._scoring)))
            if self._live:
                self._step()

    def _begin(self, submission: Submission) -> None:
        with self._changed:
            if submission not in self._open:  # a failed step ended it before it began
                return
        if submission.scored is not None:
            self._scoring[submission] = None
            return
        try:
            for place, request in enumerate(submission.requests):
                self._generate(submission, place, None if request.max_new_tokens else empty_chunk(request))
        except Exception as error:
            self._fail(submission, error)

    def _score(self, submission: Submission) -> None:
        """Scores the next prompts of a submission, and has their requests generated."""
        done = len(submission.scores)
        try:
            found = score_prompts(self.engine, first_prompts(submission.requests[done:]), submission.scored or 0)
            for place, (score, chunk) in enumerate(found, start=done):
                submission.scores[place] = score
                self._generate(submission, place, chunk)
        except Exception as error:
            self._fail(submission, error)
            return
        if len(submission.scores) == len(submission.requests):
            del self._scoring[submission]

    def _generate(self, submission: Submission, place: int, chunk: StreamChunk | None) -> None:
        """Begins a request, or delivers its only chunk."""
        if chunk is not None:
            self._count_finished(submission)
            submission.deliver([(place, chunk)])
            return
        handle = self.engine.submit(submission.requests[place], streaming=submission.streaming)
        submission.places[handle] = place
        self._live[handle] = submission

    def _fail(self, submission: Submission, error: Exception) -> None:
        if not isinstance(error, ValueError):
            log.exception("a submission could not begin")
            error = EngineFailed(f"{type(error).__name__}: {error}")
        self._end(submission)
        submission.deliver(error)

    def _count_finished(self, submission: Submission) -> None:
        with self._changed:
            self._open[submission] -= 1
            if not self._open[submission]:
                del self._open[submission]

    def _end(self, submission: Submission) -> None:
        for handle in submission.places:
            self.engine.cancel(handle)
            del self._live[handle]
        submission.places.clear()
        self._scoring.pop(submission, None)
        with self._changed:
            self._open.pop(submission, None)

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            submissions = list(self._open)
        for submission in submissions:
            self._end(submission)
            submission.deliver(error)

    def _step(self) -> None:
        try:
            chunks = self.engine.step()
        except Exception as error:  # whatever it is, other requests may still be served
            log.exception("a step of the engine failed; its requests are ended")
            failed = EngineFailed(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            self._end_all(failed)
            return
        found: dict[Submission, list[tuple[int, StreamChunk]]] = {}
        for chunk in chunks:
            submission = self._live[chunk.handle]
            found.setdefault(submission, []).append((submission.places[chunk.handle], chunk))
            if chunk.finish_reason:
                del self._live[chunk.handle], submission.places[chunk.handle]
                self._count_finished(submission)
        for submission, items in found.items():
            submission.deliver(items)
