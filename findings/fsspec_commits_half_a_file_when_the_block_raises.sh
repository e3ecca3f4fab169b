#!/usr/bin/env bash
# `with s3fs.open(path, "wb") as f:` uploads what was written so far when the block raises: a cut file stands under its final
# name, in place of the whole one that was there. Up to then nothing is visible, so the exception is what publishes it.
#
# One expects: an object appears whole or not at all, since an upload has to be completed to appear; leaving the block by an
#   exception abandons it (obstore's open_writer does so).
# What happens: fsspec's `__exit__` closes the file whatever the reason, and closing completes the upload, of one part or
#   of many. Only `f.discard()` instead of `f.close()` keeps the old object.
# Who suffers: exports and packed shards whose producer fails in the middle, on any fsspec file system (s3fs, gcsfs, memory).
# qwen_jax: writes local files through `files.py` (temporary name, then rename), which has no rename on a bucket. Its
#   bucket half must not write streams by `fsspec.open`, or must call `f.discard()` when the block raises.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  's3fs==2026.9.0' 'fsspec==2026.9.0' 'aiobotocore==3.10.0' 'boto3==1.43.117' 'botocore==1.43.117' \
  'moto[s3]==5.2.5' 'flask==3.1.3' 'flask-cors==6.0.5' 'obstore==0.12.1'
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y AWS_DEFAULT_REGION=us-east-1
"$work/venv/bin/python" - 2> "$work/log" <<'PYTHON'
import contextlib

import fsspec
import moto
import obstore
import s3fs
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

print(f"fsspec {fsspec.__version__}, s3fs {s3fs.__version__}, obstore {obstore.__version__}, moto {moto.__version__}")
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://{}:{}".format(*server.get_host_and_port())
fs = s3fs.S3FileSystem(endpoint_url=url, use_listings_cache=False)
fs.mkdir("bucket")
store = S3Store("bucket", endpoint=url, client_options={"allow_http": True})
whole, half = b"whole " * 100, b"whole " * 50


def kept(open_file, path, part=half):
    """What stands under a path after a writer died in the middle of replacing it."""
    fs.pipe_file(path, whole)
    with contextlib.suppress(RuntimeError), open_file() as file:
        file.write(part)
        raise RuntimeError("the producer of the second half failed")
    return fs.cat_file(path)


@contextlib.contextmanager
def discarding():
    """As fs.open, but an exception abandons the upload."""
    file = fs.open("bucket/c", "wb")
    try:
        yield file
    except BaseException:
        file.discard()
        raise
    file.close()


small = kept(lambda: fs.open("bucket/a", "wb"), "bucket/a")
parts = kept(lambda: fs.open("bucket/b", "wb", block_size=5 << 20), "bucket/b", bytes(12 << 20))
discarded = kept(discarding, "bucket/c")
other = kept(lambda: obstore.open_writer(store, "d"), "bucket/d")
server.stop()
print(f"600 bytes were there; after the exception: s3fs {len(small)}, s3fs in parts {len(parts)}, "
      f"s3fs with discard {len(discarded)}, obstore {len(other)}")  # fmt: skip
assert small == half and len(parts) == 12 << 20, "s3fs no longer publishes half a file"
assert discarded == other == whole
print("as described: half a file took the place of the whole one")
PYTHON
