"""Pictures in prompts: where their features stand, what tells two of them apart, and the features themselves."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.programs import Programs
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.vision.config import CHANNELS, VisionConfig

# Pictures that are encoded at once, in each part of the rows.
ENCODED_TOGETHER = 4
# Features that are kept on the host: 64 pictures of Qwen-VL in bfloat16.
KEPT_BYTES = 128 << 20


def checked_images(prompt: Sequence[int] | np.ndarray, images: Sequence, config: ModelConfig) -> tuple[np.ndarray, ...]:
    """The pictures of a prompt as arrays.

    Args:
      prompt: token ids, in which each picture has `<img>`, a place for each feature, and `</img>`.
      images: see `Request`.

    Raises:
      ValueError: the model reads no pictures, one has another size or type, or they are not those of the prompt.
    """
    images = tuple(np.asarray(image) for image in images)
    vision = config.vision
    if vision is None:
        if images:
            raise ValueError(
                f"the request has {len(images)} picture(s), and the model has no image encoder: take a checkpoint of "
                "Qwen-VL, or leave them out"
            )
        return ()
    shape = (vision.image_size, vision.image_size, CHANNELS)
    for number, image in enumerate(images):
        if image.shape != shape or (image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating)):
            raise ValueError(
                f"picture {number} must be uint8, or normalized floats, {list(shape)}, found {image.dtype} "
                f"{list(image.shape)}: `qwen_jax.data.images` makes it"
            )
        if image.dtype != np.uint8 and not np.isfinite(image).all():
            raise ValueError(f"picture {number} has numbers that are not finite")
    found = len(image_places(prompt, vision))
    if found != len(images):
        raise ValueError(
            f"the prompt has {found} time(s) <img> (id {vision.image_start_id}), and the request {len(images)} "
            "picture(s): give one for each, in the order of the text"
        )
    return tuple(image if image.dtype == np.uint8 else image.astype(np.float32) for image in images)


def image_places(prompt: Sequence[int] | np.ndarray, vision: VisionConfig) -> list[slice]:
    """The positions of the features of each picture in `prompt`.

    Raises:
      ValueError: an `<img>` without its places and `</img>` after it, or an `</img>` without an `<img>` before it.
    """
    ids = np.asarray(prompt, np.int64)
    starts = np.flatnonzero(ids == vision.image_start_id)
    ends = np.flatnonzero(ids == vision.image_end_id)
    for start in starts:
        end = start + vision.num_queries + 1
        if end >= len(ids) or ids[end] != vision.image_end_id or (ids[start + 1 : end] == vision.image_start_id).any():
            raise ValueError(
                f"<img> at position {start} of the prompt must be followed by {vision.num_queries} places for features "
                f"and </img> (id {vision.image_end_id}) at position {end}"
            )
    if alone := sorted(set(ends.tolist()) - set((starts + vision.num_queries + 1).tolist())):
        raise ValueError(f"</img> at position {alone[0]} of the prompt has no <img> before it")
    return [slice(int(start) + 1, int(start) + 1 + vision.num_queries) for start in starts]


def digest(image: np.ndarray) -> int:
    """A negative number that tells pictures apart by their content."""
    content = hashlib.blake2b(image.tobytes(), digest_size=16, person=image.dtype.name.encode())
    return -1 - int.from_bytes(content.digest())


def prompt_key(prompt: Sequence[int], images: Sequence[np.ndarray], vision: VisionConfig | None) -> tuple[int, ...]:
    """The prompt with the digest of each picture in its places: prompts with equal keys have equal hidden states."""
    key = list(prompt)
    if images:
        assert vision is not None  # see `checked_images`
        for places, image in zip(image_places(prompt, vision), images, strict=True):
            key[places] = [digest(image)] * vision.num_queries
    return tuple(key)


class Features:
    """Computes the features of pictures, and keeps those of the pictures that were used last on the host.

    They are of one set of weights: `clear` before others come.
    """

    def __init__(self, call: Programs, config: ModelConfig, ways: int):
        """Holds nothing yet.

        Args:
          call: runs the programs.
          ways: into how many parts the mesh splits rows.
        """
        self._call, self._config, self._ways = call, config, ways
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()  # by digest, least recently used first

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def of(self, params, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features [num_queries, hidden] of each picture, in the compute dtype.

        Args:
          params: as `weights.prepare` gives them.
          images: as `checked_images` gives them.
        """
        digests = [digest(image) for image in images]
        missing = {of: image for of, image in zip(digests, images, strict=True) if of not in self._kept}
        waiting = list(missing)
        while waiting:
            many = self._ways * ENCODED_TOGETHER
            count = many if 4 * len(waiting) >= 3 * many else self._ways
            together, waiting = waiting[:count], waiting[count:]
            found = self._encode(params, [missing[of] for of in together], count)
            self._kept |= zip(together, found, strict=True)
        found = [self._kept[of] for of in digests]
        for of in digests:
            self._kept.move_to_end(of)
        while sum(features.nbytes for features in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return found

    def _encode(self, params, images: list[np.ndarray], count: int) -> list[np.ndarray]:
        pixels = np.stack(images + images[-1:] * (count - len(images)))
        key = ("encode", f"{count} pictures", str(pixels.dtype))
        features = self._call(programs.encode_images, key, self._config, params["vision"], pixels)
        return list(np.asarray(features)[: len(images)])
