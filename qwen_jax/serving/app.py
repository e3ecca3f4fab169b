"""The routes of the server (OpenAI's API reference), as an ASGI application."""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen_jax.inference import StreamChunk
from qwen_jax.serving import responses
from qwen_jax.serving.choices import Choice, Part, whole
from qwen_jax.serving.engine_thread import EngineFailed, EngineThread, QueueFull, Stopped, Submission
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.fields import read_body
from qwen_jax.serving.metrics import Metrics
from qwen_jax.serving.protocol import Job, Served, parse_chat, parse_completion

log = logging.getLogger(__name__)

RETRY_SECONDS = 1
IGNORED_HEADER = "x-ignored-fields"
_MOST_NAMES = 100  # of ignored fields in the log
# A body that is too large is read to its end, up to so many times the limit, as a client that is still sending would
# see a broken connection instead of the answer, and send it again.
_DRAINED = 8
_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE = {
    "index.html": "text/html",
    "chat.css": "text/css",
    "chat.js": "text/javascript",
    "pictures.js": "text/javascript",
}
# The page uses nothing but this server, and no other page may show it in a frame.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class Service:
    """What the routes share.

    Args:
        thread: owns the engine; it has been started.
        served: what is served.
        api_key: without it, a request to anything but the page and `/health` is refused; None: there is none.
        max_request_bytes: the largest body.
        local: whether the server listens on this machine only.

    Attributes:
        metrics: of this server.
        draining: whether new requests are refused, as the server is about to end.
        answering: number of requests that are being answered.
    """

    def __init__(
        self, thread: EngineThread, served: Served, api_key: str | None, max_request_bytes: int, local: bool = True
    ):
        self.thread, self.served, self.max_request_bytes = thread, served, max_request_bytes
        self._api_key, self._local = api_key, local
        self.metrics = Metrics(thread.engine.slots, lambda: thread.rows_in_use, lambda: thread.waiting)
        self._ignored: set[str] = set()
        self.draining = False
        self.answering = 0
        self.started = int(time.time())

    def check_caller(self, request: Request) -> None:
        """Refuses a request without the key, and one that a page of another site may have made."""
        if self._api_key is None:
            # The owner of a site can let its name lead to this machine, and so read what a local server answers.
            # Not `request.url`, which has the server's own address where it cannot read the header.
            host = _without_port(request.headers.get("host", "localhost"))
            if self._local and not _is_local_name(host):
                raise ApiError(403, f"the host {host!r} is no address: use http://127.0.0.1 or localhost")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._api_key.encode()):
            raise ApiError(401, "this server needs its key: send the header Authorization: Bearer KEY")

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send other kinds to a server on this machine without asking the browser.
        if kind != "application/json":
            raise ApiError(415, f"send JSON with the header Content-Type: application/json, found {kind!r}")
        data, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= self.max_request_bytes:
                data += part
            elif size > _DRAINED * self.max_request_bytes:
                break
        if size > self.max_request_bytes:
            raise ApiError(413, f"the body may have {self.max_request_bytes} bytes at most: send less")
        return await run_in_threadpool(read_body, bytes(data))

    def submit(self, job: Job) -> Submission:
        """Gives the requests of a job to the engine."""
        if self.draining:
            raise ApiError(503, "the server is about to end: send the request to another one")
        try:
            submission = self.thread.submit(
                job.requests, streaming=job.stream, scored=job.top_log_probs if job.echo and job.logprobs else None
            )
        except QueueFull:
            waiting = self.thread.max_waiting
            raise ApiError(
                429, f"all rows are in use and {waiting} requests may wait: try again", retry_after=RETRY_SECONDS
            ) from None
        except Stopped:
            raise ApiError(503, "the server is about to end: send the request to another one") from None
        self.metrics.prompt_tokens.inc(responses.usage(job, 0)["prompt_tokens"])
        return submission

    def about_ignored(self, job: Job) -> dict[str, str]:
        """Headers that name the fields of a request without effect; the log names each field once."""
        for name in job.ignored:
            if name not in self._ignored and len(self._ignored) < _MOST_NAMES:
                self._ignored.add(name)
                log.warning("requests have the field %s, which is not known here and has no effect", name)
        return {IGNORED_HEADER: ", ".join(job.ignored)} if job.ignored else {}

    async def chunks(self, submission: Submission, begun: float) -> AsyncIterator[tuple[int, StreamChunk]]:
        """The chunks of a submission, counted and timed."""
        last: dict[int, float] = {}
        try:
            async for place, chunk in submission:
                now = time.perf_counter()
                if chunk.tokens:
                    if place in last:
                        self.metrics.between_tokens.observe((now - last[place]) / len(chunk.tokens))
                    else:
                        self.metrics.first_token.observe(now - begun)
                    last[place] = now
                self.metrics.generated_tokens.inc(len(chunk.tokens))
                yield place, chunk
        except EngineFailed as error:
            raise ApiError(500, f"the engine failed ({error}); the log of the server says more") from error
        except Stopped:
            raise ApiError(503, "the server ended before the reply was whole") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from error


def _without_port(header: str) -> str:
    """The host that a Host header names; the header itself where it has no such form."""
    found = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*))(?::\d*)?", header)
    return header if found is None else (found[1] or found[2] or "").lower()


def _is_local_name(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, what has not been generated yet is not."""

    def __init__(
        self, events: AsyncIterator[bytes], submission: Submission, metrics: Metrics, headers: Mapping[str, str]
    ):
        # no-cache and no buffering by proxies, or the client would see the reply at its end only.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._submission, self._metrics, self.whole = submission, metrics, False

    async def stream_response(self, send: Send) -> None:
        """See `StreamingResponse`."""
        await super().stream_response(send)
        self.whole = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.cancel()
            if not self.whole:
                self._metrics.disconnects.inc()


async def _events(service: Service, job: Job, submission: Submission, begun: float) -> AsyncIterator[bytes]:
    answer = responses.Answer(job, service.served.model)
    choices = [Choice(job, service.served.tokenizer) for _ in job.requests]
    tokens, cached = 0, {}
    for data in answer.begin():
        yield data
    try:
        async for place, chunk in service.chunks(submission, begun):
            tokens += len(chunk.tokens)
            if chunk.result is not None:
                cached[place] = chunk.result.cached_tokens
            for data in answer.events(place, choices[place].take(chunk, submission.scores.get(place))):
                yield data
    except ApiError as error:
        yield responses.event(error.body)
        return
    except Exception as error:
        log.exception("a stream ended with an error")
        yield responses.event(_failed(error).body)
        return
    for data in answer.end(responses.usage(job, tokens, cached)):
        yield data


async def _whole(service: Service, job: Job, submission: Submission, begun: float) -> bytes:
    choices = [Choice(job, service.served.tokenizer) for _ in job.requests]
    parts: list[list[Part]] = [[] for _ in job.requests]
    tokens, cached = 0, {}
    async for place, chunk in service.chunks(submission, begun):
        tokens += len(chunk.tokens)
        if chunk.result is not None:
            cached[place] = chunk.result.cached_tokens
        parts[place].append(choices[place].take(chunk, submission.scores.get(place)))
    answer = responses.Answer(job, service.served.model)
    return responses.dump(answer.whole([whole(one) for one in parts], responses.usage(job, tokens, cached)))


async def _unless_disconnected(request: Request, work) -> Any:
    """The result of a coroutine, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left.
    """

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def create_app(service: Service) -> Starlette:
    """The application.

    Args:
        service: what its routes share.
    """

    async def generate(request: Request, parse: Callable[[Mapping, Served], Job]) -> Response:
        begun = time.perf_counter()
        service.check_caller(request)
        body = await service.body(request)
        job = await run_in_threadpool(parse, body, service.served)
        submission = service.submit(job)
        headers = service.about_ignored(job)
        if job.stream:
            return EventStream(_events(service, job, submission, begun), submission, service.metrics, headers)
        try:
            content = await _unless_disconnected(request, _whole(service, job, submission, begun))
        except ClientDisconnect:
            service.metrics.disconnects.inc()
            return Response(status_code=499)  # nobody reads it
        finally:
            submission.cancel()
        return Response(content, headers=headers, media_type="application/json")

    async def chat_completions(request: Request) -> Response:
        return await generate(request, parse_chat)

    async def completions(request: Request) -> Response:
        return await generate(request, parse_completion)

    def described() -> dict[str, Any]:
        reads = ["text"] if service.served.vision is None else ["text", "image"]
        return {
            "id": service.served.model,
            "object": "model",
            "created": service.started,
            "owned_by": "qwen_jax",
            "input_modalities": reads,
        }

    async def models(request: Request) -> Response:
        service.check_caller(request)
        return _json({"object": "list", "data": [described()]})

    async def model(request: Request) -> Response:
        service.check_caller(request)
        if (name := request.path_params["name"]) != service.served.model:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return _json(described())

    async def health(request: Request) -> Response:
        status = "draining" if service.draining else "stopped" if service.thread.stopping else "ok"
        return _json({"status": status}, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        service.check_caller(request)
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in _PAGE:
            raise HTTPException(404, "Not Found")
        return Response((_PAGE_FOLDER / name).read_bytes(), media_type=_PAGE[name], headers=_PAGE_HEADERS)

    routes = [
        Route("/v1/chat/completions", _counted(service, chat_completions), methods=["POST"]),
        Route("/v1/completions", _counted(service, completions), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/", page),
        Route("/page/{name}", page),
        Route("/metrics", metrics),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers)


class _counted:
    """An endpoint as an ASGI application: counts its answers and those under way; gives errors OpenAI's form."""

    def __init__(self, service: Service, endpoint: Callable):
        self._service, self._endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        status = 500
        self._service.answering += 1
        try:
            try:
                response = await self._endpoint(request)
            except ApiError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            status = response.status_code
            await response(scope, receive, send)
        finally:
            self._service.answering -= 1
            self._service.metrics.requests.labels(scope["path"], str(status)).inc()


def _json(content: object, status: int = 200) -> Response:
    return Response(responses.dump(content), status, media_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(responses.dump(error.body), error.status, error.headers, "application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path}: {error.detail}"
    response = _error(ApiError(error.status_code, found))
    response.headers.update(error.headers or {})
    return response


async def _bug(request: Request, error: Exception) -> Response:
    # uvicorn logs the traceback after this answer.
    return _error(_failed(error))


def _failed(error: Exception) -> ApiError:
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
