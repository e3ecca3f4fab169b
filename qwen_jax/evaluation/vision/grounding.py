"""Boxes that a model writes, and how well they fit."""

import math
import re
from collections.abc import Sequence

# The released evaluation takes coordinates as parts of 999, its drawing code as parts of 1,000.
RELEASED_EVALUATION, RELEASED_DRAWING = 999, 1000
_BOX = re.compile(r"\((.*?)\),\((.*?)\)")

Box = tuple[float, float, float, float]


def read_box(text: str) -> Box | None:
    """The first box `(x1,y1),(x2,y2)` of a text as it stands, without its tags; None: there is none.

    As the released evaluation reads it: the first pair of parentheses with a comma between counts, and where no two
    numbers are in each, there is no box. Nor is there one where a number is infinite or nan.
    """
    found = _BOX.search(text)
    if found is None:
        return None
    try:
        (x1, y1), (x2, y2) = ([float(one) for one in corner.split(",")] for corner in found.groups())
    except ValueError:
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def to_pixels(box: Box, width: float, height: float, units: int = RELEASED_EVALUATION) -> Box:
    """A box in pixels of a picture of this size.

    Args:
        box: x1, y1, x2, y2 in parts of the width and height.
        units: parts: 999 as in the released evaluation, where 999 is the right edge, or 1,000.
    """
    x1, y1, x2, y2 = box
    return x1 / units * width, y1 / units * height, x2 / units * width, y2 / units * height


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Area of the intersection over that of the union of two boxes x1, y1, x2, y2; 0 where both are empty.

    As torchvision's `box_iou`: the area of a box with corners in the wrong order is what the product says.
    """
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0
