#!/usr/bin/env bash
# gcp-storage-emulator takes every conditional write: ifGenerationMatch is not looked at. A lock made of "create unless it
# exists" is won by everybody, so a test on it cannot fail when the lock is wrong, and does fail when it is right.
#
# One expects: status 412 for a write or delete whose ifGenerationMatch does not hold, as Google Cloud Storage answers.
# What happens: 200, the object is overwritten or deleted. (moto 5.2.5's S3 server does refuse with 412, for
#   If-None-Match and If-Match, on plain and on multipart uploads.)
# Who suffers: tests of locks, of commit markers and of "an object changed while it was read" that run on this server.
# qwen_jax: does not write to buckets yet. Conditional writes to GCS need another server for their tests
#   (fake-gcs-server), or a proxy that checks generations.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'gcp-storage-emulator==2026.7.19'
"$work/venv/bin/python" - 2> "$work/log" <<'PYTHON'
import importlib.metadata
import json
import socket
import urllib.error
import urllib.request

from gcp_storage_emulator.server import create_server

print("gcp-storage-emulator", importlib.metadata.version("gcp-storage-emulator"))
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
server.start()


def request(method, path, body=None):
    """(status, body) of a request to the server."""
    headers = {"Content-Type": "application/octet-stream"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def write(owner, generation):
    path = f"/upload/storage/v1/b/bucket/o?uploadType=media&name=lock&ifGenerationMatch={generation}"
    return request("POST", path, owner)


first = write(b"first", 0)
second = write(b"second", 0)
third = write(b"third", int(json.loads(first[1])["generation"]) + 1)
_, content = request("GET", "/storage/v1/b/bucket/o/lock?alt=media")
deleted, _ = request("DELETE", "/storage/v1/b/bucket/o/lock?ifGenerationMatch=1")
server.stop()
print("create unless there:", first[0], "again by another:", second[0], "with a wrong generation:", third[0])
print("the lock holds", content, "and a delete with a wrong generation answers", deleted)
assert (first[0], second[0], third[0], content) == (200, 200, 200, b"third"), "preconditions are looked at now"
assert deleted in (200, 204)
print("as described: no precondition is checked")
PYTHON
