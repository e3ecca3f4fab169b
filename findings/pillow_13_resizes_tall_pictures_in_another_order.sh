#!/usr/bin/env bash
# Pillow 13.0.0 resizes tall pictures to other colors than 12.3.0 does, by up to 16 levels of 255: it begins with the
# vertical pass where the height shrinks more, and each pass rounds to 8 bits and clips.
#
# One expects: resize(BICUBIC) of the same picture gives the same bytes in every release; files of expected features made
#   with one Pillow hold for another.
# What happens: pictures whose height shrinks more than their width differ in more than a fourth of their bytes; all
#   others are equal, so that a test with landscape pictures alone sees nothing.
# Who suffers: parity tests of image encoders, caches of preprocessed pictures, and models that are served with another
#   Pillow than they were trained with (portraits, scanned pages, screenshots of telephones).
# qwen_jax: requirements.txt pins Pillow; tests/data/test_images.py compares with Pillow's own bytes, and with the
#   golden files to the last bit only where the release that made them is installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/resize.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

random = np.random.default_rng(0)
resized = {}
for name, (width, height) in {"tall": (37, 211), "wide": (211, 37), "landscape": (320, 240), "small": (20, 30)}.items():
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized[name] = np.asarray(Image.fromarray(noise).resize((112, 112), Image.Resampling.BICUBIC))
np.savez(sys.argv[1], **resized)
print("Pillow", PIL.__version__)
PYTHON
for version in 12.3.0 13.0.0; do
    python3.11 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null "pillow==$version" 'numpy==2.4.6'
    "$work/$version/bin/python" "$work/resize.py" "$work/$version.npz"
done
"$work/13.0.0/bin/python" - "$work/12.3.0.npz" "$work/13.0.0.npz" <<'PYTHON'
import sys

import numpy as np

older, newer = (np.load(name) for name in sys.argv[1:])
found = {}
for name in older:
    difference = np.abs(older[name].astype(int) - newer[name])
    found[name] = int(difference.max())
    print(f"{name}: largest difference {difference.max()} of 255, in {(difference > 0).mean():.0%} of the bytes")
assert found["tall"] > 10, "tall pictures are equal now"
assert found["wide"] == found["landscape"] == found["small"] == 0, "others differ, too"
print("as described: the order of the passes depends on the release and on the picture")
PYTHON
