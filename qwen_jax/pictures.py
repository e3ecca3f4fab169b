"""Pictures of prompts and conversations on the command line: files to what the engine sees, replies to drawn boxes."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_jax import files
from qwen_jax.data import boxes
from qwen_jax.data.content import Content, Picture, pictures, with_labels
from qwen_jax.data.images import open_image, squash
from qwen_jax.inference import Engine
from qwen_jax.models.vision.config import VisionConfig

MAX_FILE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A picture that was read.

    Attributes:
      path: its file.
      pixels: what the model sees of it, uint8 [image_size, image_size, 3].
    """

    path: Path
    pixels: np.ndarray


def vision_of(engine: Engine) -> VisionConfig:
    """The sizes of the engine's image encoder.

    Raises:
      ValueError: its model has none.
    """
    vision = engine.model.config.vision
    if vision is None:
        raise ValueError("the checkpoint has no image encoder, so it takes no pictures: take one of Qwen-VL")
    return vision


def load_picture(path: str | os.PathLike, vision: VisionConfig) -> Loaded:
    """Reads the picture of a file.

    Raises:
      OSError: there is no such file, or it cannot be read.
      UnusableImageError: it is no picture, damaged, or too large.
    """
    path = files.as_path(path, "image")
    check_files([path])
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MAX_FILE_BYTES:,}: a picture should be smaller")
    return Loaded(path, squash(open_image(path), vision.image_size))


def load_content(engine: Engine, content: Content, label: str, folder: str | Path = "") -> tuple[Content, list[Loaded]]:
    """The content of a prompt with labels before its pictures, and the pictures, which are named by path.

    Args:
      label: see `with_labels`.
      folder: that relative paths begin in.

    Raises:
      ValueError, OSError: there is a picture, and the model has no encoder; or see `load_picture`.
    """
    found = pictures(content)
    if not found:
        return content, []
    vision = vision_of(engine)
    loaded = [load_picture(path, vision) for path in picture_paths(content, folder)]
    return with_labels([content], label)[0], loaded


def picture_paths(content: Content, folder: str | Path = "") -> list[Path]:
    """Paths of the pictures in some content; relative ones begin in `folder`."""
    names, base = [os.fsdecode(picture.image) for picture in pictures(content)], files.as_path(folder or ".")
    return [files.as_path(name) if os.path.isabs(name) or files.is_remote(name) else base / name for name in names]


def check_files(paths: Sequence[str | Path], where: str = "") -> None:
    """Looks for the files of pictures.

    Raises:
      FileNotFoundError: one is missing; the message begins with `where`.
    """
    for path in paths:
        if not files.as_path(path, "image").is_file():
            raise FileNotFoundError(f"{where}there is no picture {path}")


def prompt_with(images: Sequence[str | os.PathLike], text: str) -> Content:
    """Content of pictures and the text after them."""
    return (*(Picture(str(path)) for path in images), text) if images else text


def draw_reply(text: str, picture: str | Path | None, folder: str | Path) -> list[str]:
    """Draws the boxes of a reply on a picture.

    The file has the name of the picture and the first number that no file in the folder has, and appears whole.

    Args:
      text: the reply.
      picture: its file; None: there is none.
      folder: of the drawing; made if missing.

    Returns:
      Lines for the user: the path of the drawing, and what was not drawn. None without boxes.

    Raises:
      ValueError, OSError: the picture cannot be read any more, or the file not be written.
    """
    found, lines = boxes.find_boxes(text)
    if found and picture is None:
        lines.append(f"the reply has {len(found)} box(es), and there is no picture to draw them on")
    elif found and picture is not None:
        folder = files.as_path(folder, "--boxes")
        folder.mkdir(parents=True, exist_ok=True)
        names = (folder / f"{files.as_path(picture).stem}-{number}.png" for number in itertools.count(1))
        path = next(name for name in names if not name.exists())
        with files.new_file(path) as temporary:
            boxes.draw(open_image(picture), found).save(temporary, "PNG")
        shown = zip(boxes.labels(found), found, strict=True)
        numbers = [f"{label} is {one.label}" for label, one in shown if not one.label.startswith(label)]
        lines.append(f"drew {len(found)} box(es) on {path}" + (f" ({', '.join(numbers)})" if numbers else ""))
    return lines
