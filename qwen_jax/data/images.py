"""Pictures as arrays: opened with limits, and resized and normalized as the released Qwen-VL does.

One function decides what becomes of each kind of picture (`open_image`), one what the encoder sees (`pixels`).
"""

import functools
import io
import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen_jax import files

# Mean and deviation of CLIP's training pictures, RGB in [0, 1] (released visual.py).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 50_000_000
# Of what Pillow reads, if it was built with it: EPS would start Ghostscript, ICO decodes a PNG of another size than it
# says before that can be looked at, others are no pictures that people have.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_WIDE_GREYS = ("I;16", "I;16L", "I;16B", "I;16N")


class UnusableImageError(ValueError):
    """A picture that cannot be read; the message names it and the reason.

    Attributes:
        reason: one of few; pictures are counted by it.
    """

    def __init__(self, message: str, reason: str = "a damaged picture"):
        super().__init__(message)
        self.reason = reason


def open_image(
    source: files.PathLike | bytes, *, name: str = "", upright: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture in RGB with 8 bits a color.

    As in the released code: transparency is dropped (the colors beneath are seen), CMYK and palettes are converted, of
    an animation the first frame counts, and the rotation that EXIF asks for is ignored, since boxes refer to the stored
    picture. Greys of 16 bits are divided by 256; Pillow, and so the released code, cuts them off at 255.

    Args:
      source: a path, on a disk or in a bucket, or the bytes of a file.
      name: what messages call the picture; by default the path.
      upright: whether to turn the picture as EXIF says.
      max_pixels: largest width times height, checked before anything is decoded.

    Raises:
      UnusableImageError: no picture of `FORMATS`, a damaged or cut one, or one with too many pixels.
      FileNotFoundError: no such file.
      OSError: the bucket does not give it.
    """
    name = name or ("an image" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and files.is_remote(source):
        source = files.as_path(source).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is ours
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise UnusableImageError(
                        f"{name} has {image.width} x {image.height} pixels, more than {max_pixels:,}: make it smaller",
                        "a picture with too many pixels",
                    )
                image.load()
                # Of PGM, Pillow brings greys of more than 8 bits to 16, and gives them as integers of 32.
                wide = image.mode in _WIDE_GREYS or (image.mode, image.format) == ("I", "PPM")
                if upright:
                    image = ImageOps.exif_transpose(image)
                if wide:
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
    except (UnusableImageError, FileNotFoundError):
        raise
    except Image.DecompressionBombError as error:  # a limit of Pillow's, which it looks at while it opens a file
        reason = "a picture with too many pixels"
        raise UnusableImageError(f"{name} has too many pixels: {error}", reason) from error
    except UnidentifiedImageError:
        raise UnusableImageError(f"{name} cannot be read as an image: it has none of the known formats") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UnusableImageError(f"{name} cannot be read as an image: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def pixels(image: Image.Image, size: int) -> np.ndarray:
    """What the encoder sees: float32 [size, size, 3], RGB less CLIP's mean, over its deviation.

    The picture is squashed to a square; its proportions are lost, as in the released code. Pillow resizes it, in 8
    bits: any other resize is up to 20 levels off at edges.

    Args:
      image: in mode RGB.
    """
    return (squash(image, size).astype(np.float32) / 255 - MEAN) / DEVIATION


def squash(image: Image.Image, size: int) -> np.ndarray:
    """A picture in mode RGB resized to a square, uint8 [size, size, 3]; see `pixels`."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def decode_images(images: Sequence[bytes], size: int) -> np.ndarray:
    """Encoded image files as the model takes them, uint8 [len(images), size, size, 3]: `squash` of `open_image`.

    The model subtracts the mean and divides by the deviation on the device. Pictures may have any size that
    Pillow decodes: the task that read them has a limit of its own.

    Raises:
      UnusableImageError: see `open_image`; the message has the number of the picture.
    """
    result = np.empty((len(images), size, size, 3), np.uint8)
    for number, data in enumerate(images):
        decode_into(data, result[number], name=f"picture {number} of {len(images)}")
    return result


def decode_into(
    data: bytes, pixels: np.ndarray, name: str, resize: Callable[[Image.Image, int], np.ndarray] = squash
) -> None:
    """An encoded image file into `pixels`, uint8 [size, size, 3]; see `decode_images`.

    Args:
      resize: `squash`, or a function that equals it.
    """
    pixels[...] = resize(open_image(data, name=name, max_pixels=sys.maxsize), len(pixels))
