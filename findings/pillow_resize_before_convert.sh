#!/usr/bin/env bash
# Pillow: resize then convert("RGB") and convert("RGB") then resize give different pictures: transparent areas turn black in
# one order and keep their colors in the other, and palette pictures are resized without any interpolation.
#
# One expects: the order is a matter of speed; BICUBIC means bicubic for every mode.
# What happens: RGBA and LA are resized with colors multiplied by alpha, which erases what lies under alpha 0 (black) and
#   coarsens colors under low alpha; palette ("P") and 1-bit pictures silently take NEAREST whatever filter is named.
# Who suffers: picture-text data with PNG and GIF (logos, charts, screenshots of text): features differ between a
#   loader that shrinks first (to save memory) and the released one, which converts first.
# qwen_jax: qwen_jax/data/images.py converts to RGB before it resizes, as Qwen-VL's released code does;
#   tests/data/test_images.py holds a transparent RGBA and a palette picture.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'pillow==13.0.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__)
SIZE = (40, 40)


def pixels(picture):
    return np.asarray(picture, np.int32)


def difference(picture):
    """Largest difference, of 255, between the two orders."""
    late = picture.resize(SIZE, Image.Resampling.BICUBIC).convert("RGB")
    early = picture.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
    return int(np.abs(pixels(late) - pixels(early)).max())


clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))  # red under full transparency
faint = Image.new("RGBA", (64, 64), (200, 100, 50, 3))
gradient = Image.radial_gradient("L").resize((64, 64))
palette = gradient.convert("RGB").quantize(16)
bits = gradient.point(lambda x: 255 * (x > 128)).convert("1")
found = {name: difference(picture) for name, picture in (
    ("alpha 0", clear), ("alpha 3", faint), ("palette", palette), ("1 bit", bits), ("RGB", gradient.convert("RGB")))}  # fmt: skip
nearest = np.array_equal(pixels(palette.resize(SIZE, Image.Resampling.BICUBIC).convert("RGB")),
                         pixels(palette.resize(SIZE, Image.Resampling.NEAREST).convert("RGB")))  # fmt: skip
print("largest difference between the two orders:", found)
print("a palette picture resized with BICUBIC equals NEAREST:", nearest)
print("alpha 3, resized:", faint.resize(SIZE, Image.Resampling.BICUBIC).getpixel((20, 20)), "of (200, 100, 50, 3)")
assert found["alpha 0"] == 255 and found["RGB"] == 0 and nearest, "the two orders agree now"
assert min(found["alpha 3"], found["palette"], found["1 bit"]) > 10
print("as described: the order changes the picture")
PYTHON
