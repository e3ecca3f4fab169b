"""Boxes in the replies of a model, and pictures with the boxes drawn.

Coordinates are thousandths of the width and of the height of the picture, see `qwen_jax.data.content`. What the model
sees is squashed to a square, so width and height map back separately. The released drawing code divides by 1,000, and
so does `draw`; the released evaluation divides by 999.
"""

import dataclasses
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from qwen_jax.data.content import UNITS, Region, Unusable, region

_TAGGED = re.compile(r"<(ref|box|quad)>(.*?)</\1>", re.DOTALL)
_POINT = re.compile(r"\(\s*(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*\)")
_CORNERS = {"box": 2, "quad": 4}
# Told apart by people who do not see all colors, too (Okabe and Ito 2008), without black.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
_BRIGHT = ("#e69f00", "#56b4e9", "#f0e442")
_SHOWN = 40  # characters of a label, and of what is wrong


@dataclasses.dataclass(frozen=True)
class LabelledRegion:
    """A region of a picture, and the text between `<ref>` and `</ref>` before it; "" where there is none."""

    label: str
    region: Region


def find_boxes(text: str) -> tuple[list[LabelledRegion], list[str]]:
    """The boxes and quadrilaterals in a reply, in its order, and a line for each that is none, which says why."""
    found, wrong = [], []
    label = ""
    for tagged in _TAGGED.finditer(text):
        kind, inside = tagged[1], tagged[2]
        if kind == "ref":
            label = " ".join(inside.split())
            continue
        numbers = [int(number) for point in _POINT.findall(inside) for number in point]
        try:
            if _POINT.sub("", inside).strip(", \n\t"):
                raise Unusable("more than points (x,y)")
            found.append(LabelledRegion(label, region(numbers, kind, _CORNERS[kind])))
        except Unusable as error:
            shown = inside if len(inside) <= _SHOWN else f"{inside[: _SHOWN - 3]}..."
            wrong.append(f"not drawn: <{kind}>{shown}</{kind}>: {error.reason}")
    return found, wrong


def labels(found: Sequence[LabelledRegion]) -> list[str]:
    """What `draw` writes at each box: its label, "" without one, or its number, from 1 on.

    The font of Pillow has no Chinese, say: a label with characters that it does not have is shown as the number.
    """
    font = ImageFont.load_default()
    shown = [one.label[:_SHOWN] for one in found]
    return [label if _writes(font, label) else str(number) for number, label in enumerate(shown, start=1)]


def draw(image: Image.Image, found: Sequence[LabelledRegion]) -> Image.Image:
    """A copy of a picture with boxes and `labels`; equal labels have one color.

    Args:
      image: in mode RGB, of any size.
    """
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    width = max(1, min(image.size) // 150)
    font = ImageFont.load_default(max(10, min(image.size) // 24))
    colors: dict[str, str] = {}
    for label, one in zip(labels(found), found, strict=True):
        color = colors.setdefault(one.label, _COLORS[len(colors) % len(_COLORS)])
        corners = [(x * image.width / UNITS, y * image.height / UNITS) for x, y in one.region.points]
        if len(corners) == 2:
            canvas.rectangle(corners, outline=color, width=width)
        else:
            canvas.line([*corners, corners[0]], fill=color, width=width, joint="curve")
        if label:
            _write(canvas, font, label, color, min(x for x, _ in corners), min(y for _, y in corners))
    return image


def _write(canvas: ImageDraw.ImageDraw, font, label: str, color: str, left: float, top: float) -> None:
    """A label on a ground of its color: above the box, or at its top where there is no room."""
    wide, high = canvas.textbbox((0, 0), label, font)[2:]
    place = min(left, max(canvas.im.size[0] - wide, 0)), top - high if top >= high else top
    canvas.rectangle((*place, place[0] + wide, place[1] + high), fill=color)
    canvas.text(place, label, fill="black" if color in _BRIGHT else "white", font=font)


def _writes(font, text: str) -> bool:
    """Whether a font has every character of a text: one that it does not have looks as U+FFFF, which no font has."""
    missing = bytes(font.getmask("\uffff"))
    return all(char.isspace() or bytes(font.getmask(char)) != missing for char in text)
