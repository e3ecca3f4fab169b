"""Object stores for tests: `s3` and `gcs` are servers on loopback with a bucket; `FaultProxy` injects faults.

A test module gets the fixtures by `from tests.object_stores import gcs, s3, stores  # noqa: F401`. They set the
environment variables of the process, which commands that it starts inherit; `store.url` is a new folder for each test
function that asks by `store.folder()`.
"""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Generator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@dataclasses.dataclass
class Store:
    """A server of objects, with a bucket.

    Attributes:
      scheme: "s3" or "gs".
      port: of the server on loopback.
      environment: variables that point clients at it.
    """

    scheme: str
    port: int
    environment: dict[str, str]
    bucket: str

    @property
    def url(self) -> str:
        """URL of the bucket."""
        return f"{self.scheme}://{self.bucket}"

    def folder(self, name: str = "") -> str:
        """URL of a new folder of the bucket."""
        return f"{self.url}/{uuid.uuid4().hex[:12]}" + (f"/{name}" if name else "")

    def through(self, proxy: "FaultProxy") -> dict[str, str]:
        """Variables that point clients at a proxy in front of the server."""
        return _environment(self.scheme, proxy.port)


def _environment(scheme: str, port: int) -> dict[str, str]:
    address = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        return {"AWS_ENDPOINT_URL": address, **_CREDENTIALS}
    return {"STORAGE_EMULATOR_HOST": address, "GOOGLE_BEARER_TOKEN": "test"}


@contextlib.contextmanager
def servers() -> Generator[dict[str, Store]]:
    """Both servers, in a process of their own, as {scheme: Store}; the variables of both are set while they run."""
    command = [sys.executable, "-m", "tests.object_server"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        ports = [int(port) for port in process.stdout.readline().split()]
        assert len(ports) == 2, "the servers did not start"
        found = {
            scheme: Store(scheme, port, _environment(scheme, port), f"{scheme}-bucket-of-tests")
            for scheme, port in zip(("s3", "gs"), ports, strict=True)
        }
        for store in found.values():
            make_bucket(store, store.bucket)
        with environment(found["s3"].environment | found["gs"].environment):
            yield found
    finally:
        process.stdin.close()
        process.wait()


def make_bucket(store: Store, name: str) -> None:
    """Makes a bucket."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", store.port)
    signed = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", f"/{name}", headers={"Authorization": signed, "Content-Length": "0"})
    answer = connection.getresponse()
    assert answer.status == 200 or b"AlreadyOwned" in answer.read(), answer.status
    connection.close()


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Generator[None]:
    """Sets variables of this process, and forgets the stores that were opened under others."""
    from qwen_jax.files import objects

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    objects.forget_stores()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        objects.forget_stores()


@pytest.fixture(scope="module")
def stores():
    """Both servers by scheme."""
    pytest.importorskip("obstore", reason="needs the extra s3")
    pytest.importorskip("moto", reason="needs the extra test")
    with servers() as found:
        yield found


@pytest.fixture(scope="module")
def s3(stores) -> Store:
    """A server of S3."""
    return stores["s3"]


@pytest.fixture(scope="module")
def gcs(stores) -> Store:
    """A server of Cloud Storage's XML interface."""
    return stores["gs"]


@dataclasses.dataclass
class Fault:
    """What befalls the next `count` requests that match.

    Attributes:
      match: regular expression for "METHOD /bucket/key?query", found anywhere in it.
      kind: "503", "403", "404", "412", "region", "expired" (a token that is refused as too old), "delay" (`seconds`
        before the request is passed on), "cut_upload" (the connection ends in the middle of the request's body),
        "cut_download" (in the middle of the answer's), "lost" (the request is carried out and its answer never sent).
    """

    match: str
    kind: str
    count: int = 1
    seconds: float = 0.0
    met: int = 0


_EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)
_ANSWERS = {
    "503": (b"503 Service Unavailable", b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"),
    "403": (b"403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "412": (b"412 Precondition Failed", b"<Error><Code>PreconditionFailed</Code></Error>"),
    "404": (b"404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"),
    "region": (
        b"400 Bad Request",
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting "
        b"'eu-west-1'</Message></Error>",
    ),
    "expired": (b"400 Bad Request", _EXPIRED),
}


class FaultProxy:
    """An HTTP proxy on loopback in front of a store; use it as a context manager.

    It passes one request per connection on. `latency` seconds are added to each; `faults` befall those that match;
    `seen` has "METHOD /bucket/key?query", without escapes, of all. `hold` makes requests that match wait until
    `release`, and `wait_for` returns when one has come: events for tests that kill a process at a certain point.
    """

    def __init__(self, store: Store, latency: float = 0.0):
        self._target, self.latency = store.port, latency
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._changed = threading.Condition()
        self._held: list[str] = []
        self._loop = asyncio.new_event_loop()
        self.port = 0

    def __enter__(self) -> "FaultProxy":
        started = threading.Event()

        def serve():
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(
                asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
            )
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self._loop.run_forever()
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def hold(self, match: str) -> None:
        """From now on, requests that match wait until `release`."""
        with self._changed:
            self._held.append(match)

    def release(self) -> None:
        """Passes all held requests on, and holds no others."""
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def wait_for(self, match: str, timeout: float = 120.0, count: int = 1) -> None:
        """Returns when `count` requests that match have come since the proxy was started."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: sum(bool(re.search(match, one)) for one in self.seen) >= count, timeout
            )
        assert done, f"no request {match!r} within {timeout} s; the last were {self.seen[-5:]}"

    def _note(self, request: str) -> Fault | None:
        with self._changed:
            self.seen.append(request)
            self._changed.notify_all()
            for fault in self.faults:
                if fault.met < fault.count and re.search(fault.match, request):
                    fault.met += 1
                    return fault
        return None

    def _is_held(self, request: str) -> bool:
        return any(re.search(match, request) for match in self._held)

    async def _connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._request(reader, writer)
        with contextlib.suppress(ConnectionError, RuntimeError, asyncio.CancelledError):
            writer.close()

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [line for line in lines if line and not line.lower().startswith("connection:")]
        size = next((int(one.partition(":")[2]) for one in headers if one.lower().startswith("content-length:")), 0)
        request = urllib.parse.unquote(" ".join(first.split(" ")[:2]))
        fault = self._note(request)
        if fault is not None and fault.kind == "cut_upload":
            await reader.readexactly(size // 2)
            writer.transport.abort()
            return
        body = await reader.readexactly(size)
        while self._is_held(request):
            await asyncio.sleep(0.02)
        wait = self.latency + (fault.seconds if fault is not None and fault.kind == "delay" else 0.0)
        if wait:
            await asyncio.sleep(wait)
        if fault is not None and fault.kind in _ANSWERS:
            status, text = _ANSWERS[fault.kind]
            writer.write(
                b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text
            )
            await writer.drain()
            return
        upstream, sender = await asyncio.open_connection("127.0.0.1", self._target, limit=1 << 20)
        sender.write("\r\n".join([first, *headers, "Connection: close", "", ""]).encode("latin-1") + body)
        await sender.drain()
        answer = await upstream.readuntil(b"\r\n\r\n")
        lines = answer.decode("latin-1").split("\r\n")[:-2]
        lines = [line for line in lines if not line.lower().startswith("connection:")]
        length = next((int(one.partition(":")[2]) for one in lines if one.lower().startswith("content-length:")), None)
        content = b"" if first.startswith("HEAD ") else await upstream.read(-1)
        sender.close()
        if fault is not None and fault.kind == "lost":
            writer.transport.abort()
            return
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
        if fault is not None and fault.kind == "cut_download":
            writer.write(content[: len(content) // 2])
            await writer.drain()
            writer.transport.abort()
            return
        assert length is None or first.startswith("HEAD ") or length == len(content)
        writer.write(content)
        await writer.drain()
