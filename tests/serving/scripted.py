"""A server whose engine says what a test tells it, and the real one, each in a thread of this process."""

import contextlib
import itertools
import threading
import types
from collections import deque
from collections.abc import Callable, Generator

from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.inference import Handle, Request, SamplingConfig
from qwen_jax.inference.batch import Row
from qwen_jax.serving.app import Service
from qwen_jax.serving.engine_thread import EngineThread
from qwen_jax.serving.protocol import Served
from qwen_jax.serving.server import Server, bind


class ScriptedEngine:
    """Replies with the text that `script` gives for the text of a prompt; ends it with `<|im_end|>`.

    Attributes:
        prompts: text of each prompt, in their order; requests: the requests.
        hold: a step waits until it is set. `steps`: tokens of a row that one step gives.
        cancelled: handles that were cancelled.
    """

    context_length = 4096

    def __init__(
        self, tokenizer: Tokenizer, script: Callable[[str], str | bytes], slots: int = 4, tokens_a_step: int = 3
    ):
        self.tokenizer, self.script, self.slots, self.tokens_a_step = tokenizer, script, slots, tokens_a_step
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=tokenizer.vocab_size))
        self.prompts: list[str] = []
        self.requests: list[Request] = []
        self.cancelled: list[Handle] = []
        self.hold = threading.Event()
        self.hold.set()
        self._numbers = itertools.count()
        self._rows: dict[Handle, tuple[Row, deque[int]]] = {}

    @property
    def live(self) -> int:
        """Number of requests that have not ended."""
        return len(self._rows)

    def submit(self, request: Request, *, streaming: bool = False) -> Handle:
        """See `Engine`."""
        text = self.tokenizer.decode(request.prompt)
        self.prompts.append(text)
        self.requests.append(request)
        reply = self.script(text)
        data = reply.encode() if isinstance(reply, str) else reply
        handle = Handle(next(self._numbers), request)
        tokens = deque([*self.tokenizer.encode_bytes(data), self.tokenizer.im_end_id])
        self._rows[handle] = Row(handle, self.tokenizer, streaming, deque()), tokens
        return handle

    def cancel(self, handle: Handle) -> bool:
        """See `Engine`."""
        if self._rows.pop(handle, None) is None:
            return False
        self.cancelled.append(handle)
        return True

    def step(self) -> list:
        """See `Engine`."""
        assert self.hold.wait(timeout=300)
        chunks = []
        for handle, (row, left) in list(self._rows.items())[: self.slots]:
            tokens = [left.popleft() for _ in range(min(self.tokens_a_step, len(left)))]
            chunks.append(row.take(tokens, [(-0.5, -0.25)] * len(tokens)))
            if row.finish_reason:
                del self._rows[handle]
        return chunks


@contextlib.contextmanager
def serving(engine, *, max_waiting: int = 8, **options) -> Generator[types.SimpleNamespace]:
    """A server over an engine: its `url`, `service` and `server`; ended and joined afterwards."""
    api_key = options.pop("api_key", None)
    max_request_bytes, grace_seconds = options.pop("max_request_bytes", 1 << 20), options.pop("grace_seconds", 30.0)
    served = Served(
        "tiny",
        engine.tokenizer,
        engine.model.config.vocab_size,
        engine.context_length,
        engine.slots + max_waiting,
        SamplingConfig(temperature=1.0),
        **options,
    )
    thread = EngineThread(engine, max_waiting)
    service = Service(thread, served, api_key, max_request_bytes)
    ready = threading.Event()
    with bind("127.0.0.1", 0) as sock:
        server = Server(service, sock, grace_seconds, lambda url: ready.set())
        url = server.url
        thread.start()
        runner = threading.Thread(target=server.serve_until_told)
        runner.start()
        try:
            assert ready.wait(timeout=300)
            yield types.SimpleNamespace(url=url, service=service, server=server, engine=engine, runner=runner)
        finally:
            hold = getattr(engine, "hold", None)
            if hold is not None:
                hold.set()
            server.drain()
            server.drain()
            runner.join(timeout=300)
            thread.stop()
            assert not runner.is_alive()
