#!/usr/bin/env bash
# fastwarc: behind one record that is shorter than its Content-Length, ArchiveIterator gives no more records.
#
# One expects: a damaged record costs itself; in a file of one gzip member per record the next member shows where to go on.
# What happens: the iterator raises "Invalid WARC header" and cannot be continued, in all three containers.
# Who suffers: whoever reads crawls that a crash or a copy damaged: one record costs the rest of a file of a gigabyte.
# qwen_jax: splits records itself (qwen_jax/curation/warc.py) and searches for the next one from the end of the damaged
#   record's own header; tests/curation/test_damage.py damages any records in five containers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fastwarc==2.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import gzip, importlib.metadata, io, sys
from fastwarc.warc import ArchiveIterator

print("python", sys.version.split()[0], "fastwarc", importlib.metadata.version("fastwarc"))


def record(number, body=b"x" * 500, cut=0):
    head = f"WARC/1.0\r\nWARC-Type: resource\r\nWARC-Target-URI: http://{number}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) - cut] + b"\r\n\r\n"


# Record 3 has 400 bytes less than its header says, as after a crash of the crawler; 27 others are intact.
records = [record(number, b"x" * 6000 if number == 3 else b"x" * 500, 400 if number == 3 else 0) for number in range(28)]
same = True
for name, data in {"plain": b"".join(records), "gzip members": b"".join(map(gzip.compress, records)),
                   "one gzip stream": gzip.compress(b"".join(records))}.items():
    found, error = 0, None
    try:
        for one in ArchiveIterator(io.BytesIO(data), parse_http=False):
            found += len(one.reader.read()) == one.content_length
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    same &= found == 4 and error == "OSError: Invalid WARC header"
    print(f"{name}: {found} whole records read, {28 - found} lost, error: {error}")
sys.exit(0 if same else "changed: records behind the damaged one are read, or another error is raised")
PYTHON
