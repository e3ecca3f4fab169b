#!/usr/bin/env bash
# When a client leaves during a stream, Starlette under uvicorn stops reading a plain generator but does not close it: the
# `finally` that should free a row of the batch runs at the next garbage collection, whenever that is. A handler that
# does not stream is not stopped at all, and with BaseHTTPMiddleware it cannot even learn that the client has gone.
#
# One expects: the generator is closed (GeneratorExit) or the handler cancelled within moments of the disconnect.
# What happens: async generators are closed at their next await. Plain ones hang where they yielded. A plain handler runs to
#   its end; request.is_disconnected() tells it True, but False once any BaseHTTPMiddleware is installed.
# Who suffers: inference servers: rows, memory of the cache and time go to clients that left; a test with one request
#   sees nothing, since a later request triggers the collection.
# qwen_jax: the server (qwen_jax/serving/app.py) frees the row of a stream in the response, not in its generator; requests
#   that do not stream wait on the engine and on http.disconnect together; there is no middleware.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'uvicorn==0.54.0' 'starlette==1.10.0'
"$work/venv/bin/python" - <<'PYTHON'
import asyncio, gc, socket, threading, time

import starlette, uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

print(f"uvicorn {uvicorn.__version__}, starlette {starlette.__version__}")
closed, asked, finished = {}, {}, threading.Event()


def plain(name):
    try:
        for _ in range(500):
            time.sleep(0.01)
            yield b"data: x\n\n"
    finally:
        closed[name] = True


async def asynchronous(name):
    try:
        for _ in range(500):
            await asyncio.sleep(0.01)
            yield b"data: x\n\n"
    finally:
        closed[name] = True


async def whole(request):
    for _ in range(50):
        await asyncio.sleep(0.02)
    asked["gone"] = await request.is_disconnected()
    finished.set()
    return PlainTextResponse("x")


def visit(path, middleware=False):
    """Asks for a path and leaves; the server is stopped by the end of this program."""
    routes = [Route("/plain", lambda r: StreamingResponse(plain("plain"))), Route("/whole", whole),
              Route("/async", lambda r: StreamingResponse(asynchronous("async")))]  # fmt: skip
    app = Starlette(routes=routes)
    if middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(0.5) if path == "/whole" else client.recv(100)
    finished.wait(30) if path == "/whole" else time.sleep(4)


gc.disable()  # a collection would hide it, at a time of its own
visit("/plain")
visit("/async")
print("4 s after the client left, finally has run:", {name: name in closed for name in ("plain", "async")})
visit("/whole")
bare = asked["gone"]
finished.clear()
visit("/whole", middleware=True)
print(f"handler without stream ran to its end; is_disconnected() said {bare}, with BaseHTTPMiddleware {asked['gone']}")
assert "plain" not in closed and "async" in closed, "plain generators are closed now"
assert bare and not asked["gone"], "is_disconnected() says otherwise now"
print("as described")
PYTHON
