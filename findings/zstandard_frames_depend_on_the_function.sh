#!/usr/bin/env bash
# python-zstandard: of a file of several frames, some functions read all and some the first alone, without an error.
#
# One expects: what `cat a.zst b.zst`, pzstd and appending writers make is read whole, as `zstd -d` does, and as
#   Python's gzip reads files of several members. RFC 8878 calls frames one after the other valid.
# What happens: stream_reader, zstandard.open and copy_stream read all frames; decompress, read_to_iter and
#   decompressobj stop at the end of the first and drop the rest. (Those that read all take the end of a file that is
#   cut off for the end of its data, where gzip raises EOFError: a download that broke reads as a shorter file.)
# Who suffers: corpora in .jsonl.zst lose documents in silence when a reader changes from one function to another.
# qwen_jax: `files.open_decompressed` goes through the frames by itself, and a frame without an end is an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 2>/dev/null 'zstandard==0.25.0'
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import gzip
import io

import zstandard

print(f"zstandard {zstandard.__version__}")
parts = [b'{"text": "one"}\n', b'{"text": "two"}\n', b'{"text": "three"}\n']
whole = b"".join(parts)
frames = b"".join(map(zstandard.compress, parts))
reader, copied = zstandard.ZstdDecompressor(), io.BytesIO()
with open("a.zst", "wb") as file:
    file.write(frames)
with zstandard.open("a.zst", "rb") as file:
    opened = file.read()
reader.copy_stream(io.BytesIO(frames), copied)
all_frames = {
    "gzip, three members": gzip.decompress(b"".join(map(gzip.compress, parts))),
    "stream_reader": reader.stream_reader(io.BytesIO(frames)).read(),
    "open": opened,
    "copy_stream": copied.getvalue(),
}
first_frame = {
    "decompress": reader.decompress(frames),
    "read_to_iter": b"".join(reader.read_to_iter(io.BytesIO(frames))),
    "decompressobj": reader.decompressobj().decompress(frames),
}
for name, read in (all_frames | first_frame).items():
    print(f"{name}: {read.count(b'text')} of 3 lines")
assert all(read == whole for read in all_frames.values()), "these no longer read all frames"
assert all(read == parts[0] for read in first_frame.values()), "these no longer read the first frame alone"

lines = b"".join(b'{"text": "%d"}\n' % number for number in range(100_000))
cut = zstandard.compress(lines)[:-100]
read = reader.stream_reader(io.BytesIO(cut)).read()
print(f"stream_reader, the last 100 bytes missing: {read.count(b'text'):,} of 100,000 lines, no error")
try:
    gzip.decompress(gzip.compress(lines)[:-100])
    raise AssertionError("gzip no longer notices a cut")
except EOFError as error:
    print(f"gzip, the last 100 bytes missing: EOFError: {error}")
assert lines.startswith(read) and len(read) < len(lines), "a cut is noticed now"
print("as described: which frames are read depends on the function")
PYTHON
