"""Servers of S3 and of Google Cloud Storage on loopback: `python -m tests.object_server` prints their two ports.

S3 is moto's. No emulator of Cloud Storage that PyPI has serves conditional writes, or uploads in parts, by the XML
interface that clients in Rust and TensorStore's S3 driver share with S3; so the second server is moto too, behind a
layer that speaks Google's headers: generations, `x-goog-if-generation-match`, `x-goog-copy-source`, bearer tokens.
Both keep everything in memory, and end when standard input does.
"""

import io
import itertools
import sys
import threading
import time
import urllib.parse

# What moto takes the service and region from.
_SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
_FAILED = b"<?xml version='1.0'?><Error><Code>PreconditionFailed</Code><Message>precondition failed</Message></Error>"


class Generations:
    """WSGI layer that gives the objects below it generations, as Cloud Storage has them."""

    def __init__(self, application):
        self._application = application
        self._generations: dict[str, int] = {}
        self._numbers = itertools.count(time.time_ns())
        self._lock = threading.RLock()

    def _ask(self, environment):
        answer = []

        def start(status, headers, error=None):
            answer[:] = [status, headers]

        body = b"".join(self._application(environment, start))
        return answer[0], answer[1], body

    def __call__(self, environment, start):
        path, method = environment["PATH_INFO"], environment["REQUEST_METHOD"]
        query = environment.get("QUERY_STRING", "")
        environment["HTTP_AUTHORIZATION"] = _SIGNED
        # The client escapes all punctuation, which Google undoes and moto does not.
        name = urllib.parse.quote(path.encode("latin-1").decode(), safe="/-._~")
        environment["RAW_URI"] = environment["REQUEST_URI"] = name + (f"?{query}" if query else "")
        length = int(environment.get("CONTENT_LENGTH") or 0)
        environment["wsgi.input"] = io.BytesIO(environment["wsgi.input"].read(length))
        if source := environment.pop("HTTP_X_GOOG_COPY_SOURCE", None):
            environment["HTTP_X_AMZ_COPY_SOURCE"] = urllib.parse.quote(urllib.parse.unquote(source))
        expected = environment.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        is_object = path.count("/") > 1 and not path.endswith("/")
        makes = is_object and (method == "PUT" and "uploadId" not in query or method == "POST" and "uploadId" in query)
        with self._lock if makes or method == "DELETE" else _nothing():
            if expected is not None and int(expected) != self._generations.get(path, 0):
                start("412 Precondition Failed", [("Content-Length", str(len(_FAILED)))])
                return [_FAILED]
            status, headers, body = self._ask(environment)
            if status.startswith("20"):
                if makes:
                    self._generations[path] = next(self._numbers)
                elif method == "DELETE" and "uploadId" not in query:
                    self._generations.pop(path, None)
        if path in self._generations:
            headers = [*headers, ("x-goog-generation", str(self._generations[path]))]
        start(status, headers)
        return [body]


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def main():
    """Serves until standard input ends."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_request(self, *_):
            """No line for each request."""

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    ports = []
    for application in (moto, Generations(moto)):
        server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports.append(server.server_port)
    print(*ports, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
