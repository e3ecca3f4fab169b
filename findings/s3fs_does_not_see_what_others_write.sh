#!/usr/bin/env bash
# Once s3fs has listed a folder, it answers exists(), isfile(), glob() and even open() from that listing for ever: an
# object that another process writes there later "does not exist". A second S3FileSystem says the same.
#
# One expects: S3 has been strongly consistent since 2020, so exists() asks the bucket, or at least a new S3FileSystem does.
# What happens: the listing is cached without a time limit, and S3FileSystem(...) with equal arguments returns the very
#   same instance, cache included. find() does not use the cache and disagrees with glob() in the same program.
#   With use_listings_cache=False each call asks the bucket.
# Who suffers: hosts that wait for a marker or a lock of another host (they wait for ever), and programs that list a
#   folder of checkpoints once and go on (they never see a newer one).
# qwen_jax: does not read buckets yet. Whatever opens one must pass use_listings_cache=False (gcsfs likewise), and a
#   test must let another client write after a listing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  's3fs==2026.9.0' 'fsspec==2026.9.0' 'aiobotocore==3.10.0' 'boto3==1.43.117' 'botocore==1.43.117' \
  'moto[s3]==5.2.5' 'flask==3.1.3' 'flask-cors==6.0.5'
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y AWS_DEFAULT_REGION=us-east-1
"$work/venv/bin/python" - 2> "$work/log" <<'PYTHON'
import boto3
import moto
import s3fs
from moto.server import ThreadedMotoServer

print(f"s3fs {s3fs.__version__}, moto {moto.__version__}")
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://{}:{}".format(*server.get_host_and_port())
other = boto3.client("s3", endpoint_url=url)  # stands for another host
other.create_bucket(Bucket="bucket")
other.put_object(Bucket="bucket", Key="run/1", Body=b"")
MARKER = "bucket/run/COMMITTED"


def seen(fs):
    """Which questions find the marker that another client has just written, after a listing of its folder."""
    other.delete_object(Bucket="bucket", Key="run/COMMITTED")
    fs.ls("bucket/run")
    other.put_object(Bucket="bucket", Key="run/COMMITTED", Body=b"yes")
    try:
        content = fs.cat(MARKER)
    except FileNotFoundError:
        content = None
    return {"exists": fs.exists(MARKER), "glob": MARKER in fs.glob("bucket/run/*"), "cat": content == b"yes",
            "find": MARKER in fs.find("bucket/run")}  # fmt: skip


cached = s3fs.S3FileSystem(endpoint_url=url)
default = seen(cached)
again = s3fs.S3FileSystem(endpoint_url=url)
second = again.exists(MARKER)
uncached = seen(s3fs.S3FileSystem(endpoint_url=url, use_listings_cache=False))
server.stop()
print("marker of another client is found by:", default)
print(f"by exists() of a second S3FileSystem: {second} (the same object: {again is cached})")
print("with use_listings_cache=False:", uncached)
assert default == {"exists": False, "glob": False, "cat": False, "find": True}, "another answer than before"
assert not second and again is cached
assert all(uncached.values())
print("as described: what others write stays unseen")
PYTHON
