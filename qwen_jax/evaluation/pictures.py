"""Prompts with pictures: token ids, and the pixels that a model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.data import chatml, content
from qwen_jax.data.images import UnusableImageError, open_image, squash
from qwen_jax.inference import Engine


def prompt(
    engine: Engine, benchmark: str, example: str, parts: Sequence[Mapping[str, Any]], room: int, *, chat: bool = False
) -> list[int]:
    """Token ids of the parts of an example (`content.parse_parts`).

    Args:
        benchmark, example: name and id, for messages.
        room: largest number of tokens; a prompt with pictures is never cut.
        chat: whether the parts are what the user says, in ChatML.

    Raises:
        ValueError: there is no room, or the model reads no pictures.
    """
    vision = engine.model.config.vision
    if vision is None:
        raise ValueError(
            f"{benchmark} shows pictures, and the checkpoint has no image encoder: take one of Qwen-VL, or leave "
            f"{benchmark} out"
        )
    assert engine.tokenizer is not None
    read = content.parse_parts(parts, f"{benchmark}, example {example}")
    if chat:
        messages = [{"role": "user", "content": read}]
        ids = chatml.encode_prompt(engine.tokenizer, messages, num_queries=vision.num_queries)
    else:
        ids = content.encode(engine.tokenizer, read, vision.num_queries)
    if len(ids) > room:
        raise ValueError(
            f"{benchmark}, example {example}: the prompt has {len(ids):,} tokens, {vision.num_queries} for each "
            f"picture, and there is room for {room:,}: take a model with a longer context"
        )
    return ids


def read(engine: Engine, benchmark: str, example: str, parts: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The pictures of an example, uint8 [image_size, image_size, 3] each, as `images.decode_images` gives them.

    Raises:
        ValueError: a file is missing or no picture; the message has the benchmark, the example and the path.
    """
    vision = engine.model.config.vision
    assert vision is not None  # see `prompt`
    found = []
    for part in parts:
        if part["type"] == "image":
            try:
                found.append(squash(open_image(part["image"]), vision.image_size))
            except (UnusableImageError, OSError) as error:
                raise ValueError(f"{benchmark}, example {example}: {error}") from error
    return found
