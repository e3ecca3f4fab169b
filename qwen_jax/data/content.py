"""Content of messages and documents that is more than text: pictures, and regions of pictures.

A picture is `<img>`, a place for each of its features (`<imgpad>`), and `</img>`. A region is written as Qwen-VL was
trained with (arXiv 2308.12966, section 2.2): the phrase that it grounds in `<ref>` and `</ref>`, then boxes or
quadrilaterals, whose coordinates are thousandths of the width and height of the picture:

    <ref>the cat</ref><box>(12,40),(530,999)</box>        <quad>(10,20),(90,20),(90,40),(10,40)</quad>

Tags are put between texts as ids. Text is untrusted: a tag that is written in it stays text, except where
`parse_tags` reads the rows of files that the released programs read.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen_jax import files
from qwen_jax.data.tokenizer import Tokenizer

# Features of a picture in the released models.
NUM_QUERIES = 256
UNITS = 1000
PICTURE_LABEL = "Picture {number}: "


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture: a name that its reader resolves, such as a path, or the bytes of an image file."""

    image: str | bytes


@dataclasses.dataclass(frozen=True)
class Reference:
    """The phrase that the regions after it ground."""

    text: str


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a picture, in thousandths of its width and height, each in [0, 1000).

    `points` are two corners of a box, the upper left one and the lower right one, or the four corners of a
    quadrilateral.
    """

    points: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Opening:
    """The opening tag of a region, at the end of a prompt: the model writes the rest."""

    tag: str = "<box>"


Part = str | Picture | Reference | Region | Opening
Content = str | Sequence[Part]


class Unusable(ValueError):
    """A row that nothing can be learned from, or something wrong.

    Attributes:
        reason: one of few; rows are counted by it.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def parse_parts(given: Sequence[object], where: str) -> tuple[Part, ...]:
    """Parts of the JSON layout.

        {"type": "text", "text": "Where is it?"}
        {"type": "image", "image": "pictures/a.png"}
        {"type": "box", "ref": "the cat", "boxes": [[12, 40, 530, 999]]}
        {"type": "quad", "ref": "EXIT", "quads": [[10, 20, 90, 20, 90, 40, 10, 40]]}
        {"type": "opening", "ref": "the cat"}                                           a box that the model writes

    `ref` may be absent. Text that holds tags stays text.

    Args:
        given: list of objects.
        where: place in messages.

    Raises:
        Unusable: a part of another type, a field that is missing, or coordinates that are none (`region`).
    """
    parts: list[Part] = []
    for number, one in enumerate(given):
        place = f"{where}, part {number}"
        kind = one.get("type") if isinstance(one, Mapping) else None
        if not isinstance(one, Mapping) or kind not in _KINDS:
            raise Unusable("a part that is no text, image, box or quad", f"{place}: type {kind!r}")
        if kind == "opening":
            parts += [*_reference(one, place), Opening()]
        elif kind in ("text", "image"):
            value = one.get(kind)
            if not isinstance(value, str) or (kind == "image" and not value):
                raise Unusable(f"a part of type {kind} without a {kind}", place)
            parts.append(value if kind == "text" else Picture(value))
        else:
            parts += _grounded(one, str(kind), place)
    return tuple(parts)


_KINDS = ("text", "image", "box", "quad", "opening")


def _reference(one: Mapping, place: str) -> list[Part]:
    reference = one.get("ref")
    if reference is not None and not isinstance(reference, str):
        raise Unusable("a reference that is no text", place)
    return [] if reference is None else [Reference(reference)]


def _grounded(one: Mapping, kind: str, place: str) -> list[Part]:
    regions = one.get(f"{kind}s" if kind == "quad" else "boxes")
    if not isinstance(regions, Sequence) or isinstance(regions, str) or not regions:
        raise Unusable(f"a part of type {kind} without regions", place)
    return _reference(one, place) + [region(numbers, place, corners=2 if kind == "box" else 4) for numbers in regions]


def region(numbers: object, where: str, corners: int = 2) -> Region:
    """A box from `[x1, y1, x2, y2]`, or a quadrilateral from the eight numbers of its corners.

    Raises:
        Unusable: another count, numbers that are no integers in [0, 1000), or a box whose first corner is not
            left of and above its second one.
    """
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != 2 * corners:
        raise Unusable(f"a region without {2 * corners} numbers", f"{where}: {numbers!r}")
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < UNITS for one in numbers):
        raise Unusable(
            f"coordinates that are no integers in [0, {UNITS})",
            f"{where}: {list(numbers)}; they are thousandths of width and height",
        )
    if corners == 2 and not (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]):
        raise Unusable("a box whose corners are in the wrong order", f"{where}: {list(numbers)}")
    return Region(tuple(zip(numbers[::2], numbers[1::2], strict=True)))


def thousandths(box: Sequence[float], width: int, height: int) -> list[int]:
    """A box in pixels, `[x1, y1, x2, y2, …]`, in thousandths of the picture, as `region` takes it.

    Numbers are rounded to the nearest thousandth, and what lies on or beyond an edge goes to 0 or 999.
    """
    sides = (width, height)
    return [min(max(round(one * UNITS / sides[place % 2]), 0), UNITS - 1) for place, one in enumerate(box)]


_TAG = re.compile("(</?(?:img|ref|box|quad)>|<imgpad>)")
_POINTS = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_BETWEEN = re.compile(r"[\s,]*")


def parse_tags(text: str, where: str) -> tuple[Part, ...]:
    """Parts of a text with tags, as rows of the released fine-tuning program have them.

    `Picture 1: <img>a.png</img>\\nWhere is <ref>it</ref>?` has a text, a picture, a text, a reference and a text. Only
    for files of training data that are known to have this layout: a tag that a user wrote becomes a control token.

    Raises:
        Unusable: a tag without its other half, one inside another, or a region without numbers.
    """
    pieces = _TAG.split(text)
    parts: list[Part] = [pieces[0]] if pieces[0] else []
    index = 1
    while index < len(pieces):
        tag = pieces[index]
        closing = f"</{tag[1:]}"
        if tag.startswith("</") or tag == "<imgpad>" or pieces[index + 2 : index + 3] != [closing]:
            raise Unusable(f"a {tag} without its other half", where)
        parts.append(_tagged(tag, pieces[index + 1], where))
        if pieces[index + 3]:
            parts.append(pieces[index + 3])
        index += 4
    return tuple(parts)


def _tagged(tag: str, inner: str, where: str) -> Part:
    if tag == "<img>":
        if not inner.strip():
            raise Unusable("an <img> without a path", where)
        return Picture(inner.strip())
    if tag == "<ref>":
        return Reference(inner)
    corners = 2 if tag == "<box>" else 4
    if not _BETWEEN.fullmatch(_POINTS.sub("", inner)):
        raise Unusable(f"a {tag} that holds no corners", f"{where}: {inner!r}")
    return region([int(one) for pair in _POINTS.findall(inner) for one in pair], where, corners)


def with_labels(contents: Sequence[Content], label: str = PICTURE_LABEL) -> list[Content]:
    """Contents of a conversation's messages with a label before each picture and a line end after it.

    The released chat models were trained with `Picture 1: <img>…</img>\\n`, numbered through the conversation.

    Args:
        contents: of all messages, in their order.
        label: `{number}` stands for the number of the picture; "" for neither labels nor line ends.
    """
    if not label:
        return list(contents)
    number, labelled = 0, []
    for content in contents:
        parts: list[Part] = []
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, Picture):
                number += 1
                parts += [label.replace("{number}", str(number)), part, "\n"]
            else:
                parts.append(part)
        labelled.append(content if isinstance(content, str) else tuple(parts))
    return labelled


def pictures(content: Content) -> list[Picture]:
    """The pictures of some content, in its order."""
    return [] if isinstance(content, str) else [part for part in content if isinstance(part, Picture)]


def written(content: Content) -> str:
    """Content as text with tags: what a person reads. Never encode it: text of a user may hold tags, too."""
    if isinstance(content, str):
        return content
    return "".join(_written(part) for part in content)


def _written(part: Part) -> str:
    if isinstance(part, Picture):
        return f"<img>{part.image if isinstance(part.image, str) else f'{len(part.image):,} bytes'}</img>"
    if isinstance(part, Reference):
        return f"<ref>{part.text}</ref>"
    if isinstance(part, Region):
        tag = "box" if len(part.points) == 2 else "quad"
        return f"<{tag}>{_corners(part)}</{tag}>"
    return part.tag if isinstance(part, Opening) else part


def _corners(part: Region) -> str:
    return ",".join(f"({x},{y})" for x, y in part.points)


def encode(tokenizer: Tokenizer, content: Content, num_queries: int = NUM_QUERIES) -> list[int]:
    """Token ids of content; each text is encoded by itself, and neighboring texts as one.

    Args:
        num_queries: features of a picture, thus places between `<img>` and `</img>`.
    """
    if isinstance(content, str):
        return tokenizer.encode(content)
    tags = tokenizer.vision_tokens
    ids: list[int] = []
    text = ""
    for part in (*content, None):
        if isinstance(part, str):
            text += part
            continue
        ids += tokenizer.encode(text) if text else []
        text = ""
        if isinstance(part, Picture):
            ids += [tags["<img>"], *[tags["<imgpad>"]] * num_queries, tags["</img>"]]
        elif isinstance(part, Reference):
            ids += [tags["<ref>"], *tokenizer.encode(part.text), tags["</ref>"]]
        elif isinstance(part, Region):
            tag = "box" if len(part.points) == 2 else "quad"
            ids += [tags[f"<{tag}>"], *tokenizer.encode(_corners(part)), tags[f"</{tag}>"]]
        elif isinstance(part, Opening):
            ids.append(tags[part.tag])
    return ids


def outside_pictures(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
    """int32 [length]: 0 for `<img>`, `<imgpad>` and `</img>`, which carry no loss, and 1 for all other tokens."""
    tags = [tokenizer.vision_tokens[name] for name in ("<img>", "<imgpad>", "</img>")]
    return (~np.isin(np.asarray(ids, np.int64), tags)).astype(np.int32)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> Content:
    """Content of the ids of a reply, the inverse of `encode`: text where there are no tags in pairs.

    Tags that are alone, or hold no corners of a region, become text.
    """
    names = {token: name for name, token in tokenizer.vision_tokens.items()}
    parts: list[Part] = []
    kept = 0  # where the text begins that is not among the parts yet
    places = [place for place, token in enumerate(ids) if token in names]
    for begin, end in zip(places, places[1:], strict=False):
        name = names[ids[begin]]
        if begin < kept or names[ids[end]] != f"</{name[1:]}" or name == "<img>":
            continue
        try:
            part = _tagged(name, _text(tokenizer, ids[begin + 1 : end]), "a reply")
        except Unusable:
            continue
        parts += [_text(tokenizer, ids[kept:begin])] if begin > kept else []
        parts.append(part)
        kept = end + 1
    if not parts:
        return _text(tokenizer, ids)
    return (*parts, *([_text(tokenizer, ids[kept:])] if len(ids) > kept else []))


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids; one that only the padded rows of a model have is U+FFFD."""
    size = tokenizer.vision_vocab_size
    pieces = (tokenizer.decode_bytes([one]) if one < size else b"\xef\xbf\xbd" for one in ids)
    return b"".join(pieces).decode("utf-8", "replace")


def to_json(content: Content, folder: str | Path) -> str | list[dict]:
    """Content in the JSON layout of `parse_parts`, or text as it stands.

    Args:
        folder: of the file that it is written to; paths of pictures are relative to it, unless one is in a bucket.
    """
    if isinstance(content, str):
        return content
    found: list[dict] = []
    reference: str | None = None
    for part in (*content, ""):
        if isinstance(part, Region):
            kind, many = ("box", "boxes") if len(part.points) == 2 else ("quad", "quads")
            numbers = [number for point in part.points for number in point]
            if reference is None and found and found[-1]["type"] == kind:
                found[-1][many].append(numbers)
            else:
                found.append({"type": kind, **({} if reference is None else {"ref": reference}), many: [numbers]})
            reference = None
            continue
        if reference is not None:
            found.append({"type": "text", "text": reference})  # the layout has no reference without regions
            reference = None
        if isinstance(part, Reference):
            reference = part.text
        elif isinstance(part, Picture):
            path = os.fsdecode(part.image)
            if not files.is_remote(path):
                path = os.path.abspath(path)
                path = path if files.is_remote(folder) else os.path.relpath(path, os.path.abspath(folder))
            found.append({"type": "image", "image": path})
        elif part:
            found.append({"type": "text", "text": part})
    return found
