#!/usr/bin/env bash
# obstore gives the bytes that there are of a range that goes past the end, and an error where the object is empty.
#
# One expects: a range is cut off at the end of the object, so that "the first 4 KB" or "everything from offset 0 on" of an
#   object of 10 bytes are 10 bytes, and of an empty object none; `suffix` ranges and reads of the whole do so.
# What happens: both are right for 10 bytes. For 0 bytes they raise GenericError, which has no status of its own: the stores in
#   memory and of a local disk here, and in the same way S3Store and GCSStore on moto's server, which answers with 416.
# Who suffers: readers that get size and first block of a file by one request: empty shards, logs and markers end them.
# qwen_jax: `qwen_jax.files.objects.open_object` asks for the metadata of such an object in a second request.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 'obstore==0.12.1' 2>/dev/null
cat > "$work/main.py" <<'PYTHON'
import tempfile
from importlib.metadata import version

import obstore
from obstore.exceptions import GenericError
from obstore.store import LocalStore, MemoryStore

RANGES = {"(0, 4096)": (0, 4096), "from offset 0": {"offset": 0}, "the last 5": {"suffix": 5}}


def read(store, path, span):
    """Number of bytes, or the name of the error."""
    try:
        return len(obstore.get(store, path, options={} if span is None else {"range": span}).bytes())
    except GenericError as error:
        return type(error).__name__


def main():
    print(f"obstore {version('obstore')}")
    for store in (MemoryStore(), LocalStore(tempfile.mkdtemp())):
        for path, size in (("ten", 10), ("empty", 0)):
            obstore.put(store, path, b"1" * size)
        found = {"whole": [read(store, path, None) for path in ("ten", "empty")]}
        found |= {name: [read(store, path, span) for path in ("ten", "empty")] for name, span in RANGES.items()}
        for name, sizes in found.items():
            print(f"{type(store).__name__:12} {name:14} of 10 bytes: {sizes[0]}, of none: {sizes[1]}")
        expected = {
            "whole": [10, 0],
            "(0, 4096)": [10, "GenericError"],
            "from offset 0": [10, "GenericError"],
            "the last 5": [5, 0],
        }
        if found != expected:
            raise SystemExit(f"{found}, expected {expected}")
    print("as described")


if __name__ == "__main__":
    main()
PYTHON
"$work/venv/bin/python" "$work/main.py"
