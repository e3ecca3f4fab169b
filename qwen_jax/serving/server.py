"""The HTTP server around the application: its socket, its readiness, and its end."""

import errno
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.concurrency import run_in_threadpool

from qwen_jax.serving.app import Service, create_app

# After the time limit for replies has passed: for what is left to be sent.
_LAST_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet, so that a port in use is found before a model is loaded.

    Args:
        host: an address of this machine, or a name of one.
        port: 0: any free one.

    Raises:
        ValueError: the port is out of range.
        OSError: there is no such address here, or the port is in use; the message says so.
    """
    if not 0 <= port < 2**16:  # getaddrinfo would take its last bits
        raise ValueError(f"--port must be from 0 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise _unusable(host, port, error) from error
    # Or another server could bind the port, too, until this one listens.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return made


def _unusable(host: str, port: int, error: OSError) -> OSError:
    hint = "; --port 0 takes any free port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
    return OSError(f"--host {host} --port {port}: {error.strerror or error}{hint}")


class Server(uvicorn.Server):
    """Serves until it is told to end: then it refuses new requests and gives those under way some time.

    Args:
        service: what is served; its thread is stopped at the end.
        sock: from `bind`.
        grace_seconds: how long requests under way may take after the first signal.
        ready: called with the URL when requests are answered.
    """

    def __init__(self, service: Service, sock: socket.socket, grace_seconds: float, ready: Callable[[str], None]):
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self._service, self._sock, self._ready = service, sock, ready
        self._grace_seconds = grace_seconds
        self._deadline = float("inf")

    @property
    def url(self) -> str:
        """Where it is reached."""
        host, port = self._sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_until_told(self) -> None:
        """Serves in this thread; in the main one, SIGTERM and SIGINT end it."""
        self.run(sockets=[self._sock])

    def drain(self) -> None:
        """Begins the end: see the class. A second call ends replies under way at once."""
        if self._service.draining:
            self._deadline = 0.0
        else:
            self._deadline = time.monotonic() + self._grace_seconds
            self._service.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`, whose signal handler this is."""
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        url = self.url
        # Connections have the option from the socket that listens; those that ended would keep the port from the next
        # server without it.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # The event loop would be silent about a failure, and the server ready without an address.
            self._sock.listen(self.config.backlog)
        except OSError as error:
            host, port = self._sock.getsockname()[:2]
            raise _unusable(host, port, error) from error
        await super().startup(sockets)
        self._ready(url)

    async def on_tick(self, counter: int) -> bool:
        """See `uvicorn.Server`, which calls it ten times a second."""
        if self._service.draining and (not self._service.answering or time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`. Replies that are not whole yet end with an error first."""
        await run_in_threadpool(self._service.thread.stop)
        await super().shutdown(sockets)
