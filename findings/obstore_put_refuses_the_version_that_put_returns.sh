#!/usr/bin/env bash
# obstore's put refuses, as the version to replace, the very result of an earlier put where the store has no version numbers.
#
# One expects: `put(store, path, data, mode=result)` replaces the object if it is still the one of `result`, as the types say:
#   `e_tag: str | None` and `version: str | None`, in the result as in `mode`; the docs recommend to keep both.
# What happens: on stores without versions (S3 without versioning, memory) the result has `version` None, and put raises
#   TypeError: 'None' is not an instance of 'str'. Without the key it works.
# Who suffers: whoever writes with a condition, such as a lock: it works on Google Cloud Storage and fails on S3.
# qwen_jax: `qwen_jax.files.objects.put` leaves out what is None.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 'obstore==0.12.1' 2>/dev/null
cat > "$work/main.py" <<'PYTHON'
from importlib.metadata import version

import obstore
from obstore.store import MemoryStore


def main():
    print(f"obstore {version('obstore')}")
    store = MemoryStore()
    first = obstore.put(store, "a", b"1")
    print("put returned", first)
    assert first["version"] is None
    try:
        obstore.put(store, "a", b"2", mode=first)
    except TypeError as error:
        print("put with it as mode: TypeError:", error)
    else:
        raise SystemExit("it is taken now")
    second = obstore.put(store, "a", b"2", mode={"e_tag": first["e_tag"]})
    print("put with its e_tag alone returned", second)
    assert bytes(obstore.get(store, "a").bytes()) == b"2"
    print("as described")


if __name__ == "__main__":
    main()
PYTHON
"$work/venv/bin/python" "$work/main.py"
