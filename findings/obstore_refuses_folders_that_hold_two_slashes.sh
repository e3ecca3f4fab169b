#!/usr/bin/env bash
# One object with two slashes in its name makes obstore unable to list its folder at all, s3fs's ls() leaves it
# out, and epath reads another object in its place. Three libraries, three answers.
#
# One expects: "a//b" is a valid key of S3 and GCS, made by any program that joins "a/" and "/b"; libraries agree on it.
# What happens: obstore.list() fails for the whole prefix, other objects included, and get/put refuse the path.
#   s3fs reads and finds it, but ls() shows a folder "a/" within "a" in its place. etils.epath shortens the name to "a/b", which is another object, before
#   any request is made.
# Who suffers: listings, copies and clean-up of a bucket in which one tool joined paths as strings; a training job that
#   reads "a/b" through epath where the user said "a//b" gets other data without an error.
# qwen_jax: does not read buckets yet. Its one file of paths must refuse two slashes by name before any
#   library sees them, and name the object when a listing meets one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  's3fs==2026.9.0' 'fsspec==2026.9.0' 'aiobotocore==3.10.0' 'boto3==1.43.117' 'botocore==1.43.117' \
  'moto[s3]==5.2.5' 'flask==3.1.3' 'flask-cors==6.0.5' 'obstore==0.12.1' 'etils[epath]==1.15.0'
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y AWS_DEFAULT_REGION=us-east-1
"$work/venv/bin/python" - 2> "$work/log" <<'PYTHON'
from importlib.metadata import version

import boto3
import obstore
import s3fs
from etils import epath
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

print(*(f"{name} {version(name)}" for name in ("obstore", "s3fs", "etils", "moto")))
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://{}:{}".format(*server.get_host_and_port())
client = boto3.client("s3", endpoint_url=url)
client.create_bucket(Bucket="bucket")
for key in ("a/b", "a/c", "a//b"):
    client.put_object(Bucket="bucket", Key=key, Body=key.encode())
store = S3Store("bucket", endpoint=url, client_options={"allow_http": True})


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error).__name__


listed = outcome(lambda: [entry["path"] for entry in obstore.list(store, "a").collect()])
got = outcome(lambda: bytes(obstore.get(store, "a//b").bytes()))
fs = s3fs.S3FileSystem(endpoint_url=url, use_listings_cache=False)
found, shown, read = fs.find("bucket/a"), fs.ls("bucket/a"), fs.cat("bucket/a//b")
shortened = str(epath.Path("s3://bucket/a//b"))
server.stop()
print("the bucket holds a/b, a/c and a//b")
print("obstore: list of a/ ->", listed, "; get of a//b ->", got)
print("s3fs: find", found, "; ls", shown, "; cat of a//b", read)
print("epath: s3://bucket/a//b is", shortened)
assert listed == "InvalidPathError" and got == "ValueError", "obstore takes such names now"
assert "bucket/a//b" in found and "bucket/a//b" not in shown and read == b"a//b"
assert shortened == "s3://bucket/a/b"
print("as described: one name, three answers")
PYTHON
