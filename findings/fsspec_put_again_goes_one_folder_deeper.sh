#!/usr/bin/env bash
# fsspec: `put("step_7", "bucket/run/7", recursive=True)` a second time does not replace what the first call wrote: it
# makes bucket/run/7/step_7 inside, and leaves the old files as they are. A retried upload so mixes two states.
#
# One expects: the same call has the same target, so a retry finishes what a failed upload began.
# What happens: as with `cp -r`, the meaning depends on whether the target exists, on a bucket: whether any object has that
#   prefix. A first try that died after one file is enough. Both with a slash at the end ("step_7/", "bucket/run/7/") mean
#   the same every time. Seen with s3fs 2026.9.0 on moto, and here on the memory file system, which shares the code.
# Who suffers: uploads of checkpoints and exports that are retried after an error: readers get the old files, and the bucket grows.
# qwen_jax: copies no folders to buckets yet. Uploads must name each file's target (`put_file`), or put a slash at the
#   end of both, with a test that uploads twice.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'fsspec==2026.9.0'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import pathlib
import sys

import fsspec

print("fsspec", fsspec.__version__)
folder = pathlib.Path(sys.argv[1], "step_7")
folder.mkdir()
fs = fsspec.filesystem("memory")


def twice(source, target):
    """What stands below /run after an upload of "old" and a second one of "new"."""
    if fs.exists("/run"):
        fs.rm("/run", recursive=True)
    for content in ("old", "new"):
        (folder / "weights").write_text(content)
        fs.put(source, target, recursive=True)
    return {path: fs.cat_file(path).decode() for path in fs.find("/run")}


plain = twice(str(folder), "/run/7")
slashes = twice(f"{folder}/", "/run/7/")
print("uploaded twice:", plain)
print("uploaded twice, with slashes at the ends:", slashes)
assert plain == {"/run/7/weights": "old", "/run/7/step_7/weights": "new"}, "a second put has the same target now"
assert slashes == {"/run/7/weights": "new"}
print("as described: the second upload went elsewhere")
PYTHON
