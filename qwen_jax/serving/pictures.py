"""Pictures in messages: `image_url` parts with `data:` URIs, decoded within limits.

Nothing is fetched, and no path is opened.
"""

import base64
import binascii
import re
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from qwen_jax.data.content import Content, Part, Picture, Unusable, parse_parts, pictures
from qwen_jax.data.conversations import Conversation, text_of
from qwen_jax.data.images import UnusableImageError, open_image, squash
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.fields import shown

_DATA_URI = re.compile(r"data:[a-z]+/[a-z0-9.+-]+;base64,", re.IGNORECASE)
# A picture takes several bytes of memory for each pixel, and all requests are parsed side by side.
_DECODING = threading.Semaphore(2)


def read_content(given: object, where: str) -> Content:
    """Content of a message: as `text_of`, or with pictures and regions among the parts of a list.

    A picture is `{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}`; regions are as
    `content.parse_parts` has them.

    Raises:
        Unusable: a part is none of these.
    """
    if not isinstance(given, list):
        return text_of(given, where)
    parts: list[Part] = []
    for number, one in enumerate(given):
        kind = one.get("type") if isinstance(one, Mapping) else None
        if kind == "image_url":
            parts.append(_picture(one.get("image_url"), f"{where}, part {number}"))
        elif kind in ("box", "quad"):
            parts += parse_parts([one], where)
        else:
            parts.append(text_of([one], where))
    return tuple(parts) if not all(isinstance(part, str) for part in parts) else "".join(map(str, parts))


def read_text(given: object, where: str) -> Content:
    """Content of a message to a model without image encoder: as `text_of`, whose errors it explains."""
    try:
        return text_of(given, where)
    except Unusable as error:
        raise Unusable(error.reason, f"{where}: this model has no image encoder, it reads text alone") from None


def _picture(given: object, where: str) -> Picture:
    url = given.get("url") if isinstance(given, Mapping) else None
    if not isinstance(url, str):
        raise Unusable("a picture without an address", f'{where}: expected {{"url": "data:image/png;base64,…"}}')
    found = _DATA_URI.match(url)
    if found is None:
        raise Unusable(
            "a picture that is not in the request",
            f"{where}: the server opens no address, send data:image/png;base64,…; found {shown(url)}",
        )
    try:
        return Picture(base64.b64decode(url[found.end() :], validate=True))
    except (binascii.Error, ValueError) as error:
        raise Unusable("a picture that is not base64", f"{where}: {error}") from None


def check_pictures(conversation: Conversation, most: int) -> None:
    """Refuses more than `most` pictures, and pictures that the user did not show.

    Raises:
        ApiError: there are such.
    """
    for number, message in enumerate(conversation.messages):
        if pictures(message.parts) and message.role != "user":
            raise bad_request("messages", f"message {number}: pictures are shown by the user, not by {message.role!r}")
    count = sum(len(pictures(message.parts)) for message in conversation.messages)
    if count > most:
        raise bad_request("messages", f"{count} pictures: there may be {most} at most")


def decoded(found: Sequence[Picture], vision: VisionConfig, max_pixels: int) -> list[np.ndarray]:
    """What the model sees of pictures of a request: uint8 [image_size, image_size, 3] each.

    Raises:
        ApiError: one is damaged, or has more than `max_pixels`.
    """
    images = []
    for number, picture in enumerate(found, start=1):
        assert isinstance(picture.image, bytes)  # see `read_content`
        try:
            with _DECODING:
                image = open_image(picture.image, name=f"picture {number}", max_pixels=max_pixels)
                images.append(squash(image, vision.image_size))
        except UnusableImageError as error:
            raise bad_request("messages", str(error)) from None
    return images
