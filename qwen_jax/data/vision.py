"""Rows with pictures to tokens and loss weights (arXiv 2308.12966, sections 3 and B).

`VisionRows` writes the tasks of the first two stages, each as a prompt, which carries no loss, and an answer, which
does, with `<|endoftext|>` behind it:

    pairs               <img>…</img>Generate the caption in English: a red square
    grounding           <img>…</img>Generate the caption in English with grounding: a <ref>square</ref><box>…</box>
    documents           texts and pictures as they stand; all text carries loss
    vqa                 <img>…</img>What is red? Answer: the square
    referring           <img>…</img><ref>the square</ref><box>…</box>
    grounded_captions   <img>…</img><ref>This</ref><box>…</box> is a square
    ocr                 <img>…</img>OCR with grounding: <ref>EXIT</ref><quad>…</quad><ref>…
    text                a document without pictures; all of it carries loss

Rows may come in the layouts of GRIT and RefCOCO (`LAYOUTS`). `VisionChatRows` writes the dialogues of the third stage
in ChatML, with `Picture 1: <img>…</img>` and a line end for each picture. The prompts are those of the paper's
appendix; the space before an answer belongs to the answer, as it does in the released models' own output.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qwen_jax.data import chat, chatml, content
from qwen_jax.data.chat import LOSS_ON, Encoded
from qwen_jax.data.content import NUM_QUERIES, PICTURE_LABEL, Content, Part, Picture, Reference, Region, Unusable
from qwen_jax.data.conversations import Conversation, from_openai, from_sharegpt, read_parts
from qwen_jax.data.tokenizer import Tokenizer

_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
_LARGEST = 1 << 31


@dataclasses.dataclass(frozen=True)
class VisionRows:
    """How the rows of picture files become examples (`qwen_jax.data.picture_records`).

    Attributes:
        kind: a key of `KINDS`.
        num_queries: features of a picture, as the model's configuration says.
        layout: a key of `LAYOUTS`: what reads a row; "" is the reader in `KINDS`.
    """

    kind: str = "pairs"
    num_queries: int = NUM_QUERIES
    layout: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: it must be one of {', '.join(KINDS)}")
        if self.layout and self.kind not in LAYOUTS.get(self.layout, {}):
            known = ", ".join(repr(name) for name, kinds in LAYOUTS.items() if self.kind in kinds) or "none"
            raise ValueError(f"vision_{self.kind}.layout is {self.layout!r}: layouts besides '' are {known}")

    def _read(self, row: Mapping) -> tuple[list[Part], list[Part]]:
        return LAYOUTS[self.layout][self.kind](row) if self.layout else KINDS[self.kind](row)

    def group(self, row: Mapping) -> str:
        """Text by whose hash a row is held out: its first picture, so that all rows of a picture are; else the row."""
        with contextlib.suppress(ValueError):  # `encode` says what is wrong with the row
            prompt, answer = self._read(row)
            return _first_picture([*prompt, *answer], row)
        return _whole(row)

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """Tokens and loss weights; raises `Unusable` and `ValueError` as the readers in `KINDS` and `LAYOUTS` do."""
        prompt, answer = self._read(row)
        parts = [*prompt, *answer]
        if not content.pictures(parts) and self.kind != "text":
            raise Unusable("a row without a picture")
        asked = content.encode(tokenizer, prompt, self.num_queries)
        said = content.encode(tokenizer, answer, self.num_queries)
        weights = np.zeros(len(asked) + len(said) + 1, np.int32)
        weights[len(asked) : -1], weights[-1] = content.outside_pictures(tokenizer, said), 1
        tokens = np.array([*asked, *said, tokenizer.endoftext_id], np.int32)
        return Encoded(tokens, weights, images=tuple(picture.image for picture in content.pictures(parts)))


def _from_pair(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"image": "a.png", "text": "a red square"}`; the text may be a list of parts.

    `language` names the language in the prompt; by default it is Chinese where most letters are, else English.
    """
    given = _field(row, "text")
    text = read_parts(given, "'text'") if isinstance(given, list) else _text(row, "text")
    return _captioned(row, [text] if isinstance(text, str) else list(text))


def _captioned(row: Mapping, answer: list[Part]) -> tuple[list[Part], list[Part]]:
    words = "".join(_text_of(part) for part in answer)
    if not words.strip():
        raise Unusable("a picture without text")
    language = row.get("language") or ("Chinese" if _is_chinese(words) else "English")
    grounding = " with grounding" if any(isinstance(part, Region) for part in answer) else ""
    return [*_pictures(row), f"Generate the caption in {language}{grounding}:"], _spaced(answer)


def _from_grounded_pair(row: Mapping) -> tuple[list[Part], list[Part]]:
    """As `_from_pair`, with a region."""
    prompt, answer = _from_pair(row)
    if not any(isinstance(part, Region) for part in answer):
        raise Unusable("a caption without a box")
    return prompt, answer


def _from_grit(row: Mapping) -> tuple[list[Part], list[Part]]:
    """A row of GRIT (Peng et al. 2023, arXiv 2306.14824): `caption`, and `ref_exps` with the places of its phrases.

    Each of these is `[start, end, x1, y1, x2, y2, confidence]`: letters of the caption, and a box in shares of width
    and height. A phrase may have several boxes. Of phrases that overlap, the longest is taken.
    """
    caption, given = _text(row, "caption"), _field(row, "ref_exps")
    boxes: dict[tuple[int, int], list[Region]] = {}
    for number, one in enumerate(given if isinstance(given, list) else [given]):
        if not isinstance(one, list) or len(one) < 6 or not _are_numbers(one[:6]):
            raise ValueError(f"expected [start, end, x1, y1, x2, y2, confidence] in 'ref_exps', found {one!r}")
        span = int(one[0]), int(one[1])
        if not 0 <= span[0] < span[1] <= len(caption):
            raise Unusable("a phrase outside its caption", f"phrase {number}: {span[0]} to {span[1]} of {len(caption)}")
        box = content.region(content.thousandths(one[2:6], 1, 1), f"phrase {number}")
        boxes.setdefault(span, []).append(box)
    taken: list[tuple[int, int]] = []
    for begin, end in sorted(boxes, key=lambda span: (span[0] - span[1], span)):
        if all(end <= first or last <= begin for first, last in taken):
            taken.append((begin, end))
    parts: list[Part] = []
    written = 0
    for begin, end in sorted(taken):
        parts += [caption[written:begin], Reference(caption[begin:end]), *boxes[begin, end]]
        written = end
    parts.append(caption[written:])
    if not taken:
        raise Unusable("a caption without a box")
    return _captioned(row, [part for part in parts if part != ""])


def _from_document(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"content": [PART, …]}`, in the order of the document."""
    parts = read_parts(_field(row, "content"), "'content'")
    return [], [parts] if isinstance(parts, str) else list(parts)


def _from_question(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"image": "a.png", "question": "What is red?", "answer": "the square"}`."""
    question, answer = _text(row, "question").strip(), _text(row, "answer").strip()
    if not question or not answer:
        raise Unusable("an empty question" if not question else "an empty answer")
    return [*_pictures(row), f"{question} Answer:"], [f" {answer}"]


def _from_reference(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"image": "a.png", "ref": "the square", "boxes": [[12, 40, 530, 999]]}`."""
    phrase = _text(row, "ref")
    if not phrase.strip():
        raise Unusable("an empty reference")
    return [*_pictures(row), Reference(phrase)], _boxes(row)


def _from_region(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"image": "a.png", "boxes": [[12, 40, 530, 999]], "text": "a red square"}`."""
    text = _text(row, "text").strip()
    if not text:
        raise Unusable("a region without text")
    return [*_pictures(row), Reference("This"), *_boxes(row), " is"], [f" {text}"]


def _from_refcoco(row: Mapping) -> tuple[list[Part], list[Part]]:
    """A phrase of RefCOCO, as `_from_reference` writes it: `ref`, COCO's `bbox`, the picture's `width` and `height`."""
    return _from_reference({**row, "boxes": [_from_coco(row)]})


def _from_refcoco_region(row: Mapping) -> tuple[list[Part], list[Part]]:
    """The same row, as `_from_region` writes it."""
    return _from_region({**row, "text": _text(row, "ref"), "boxes": [_from_coco(row)]})


def _from_coco(row: Mapping) -> list[int]:
    """`bbox` is x, y, width and height in pixels."""
    box, sides = _field(row, "bbox"), [_field(row, name) for name in ("width", "height")]
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        raise ValueError(f"expected x, y, width and height in 'bbox', found {box!r}")
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"expected pixels in 'width' and 'height', found {sides}")
    x, y, width, height = box
    return content.thousandths([x, y, x + width, y + height], *sides)


def _are_numbers(values: list) -> bool:
    """Whether all are numbers, none of them infinite, nan, or larger than any picture."""
    return all(isinstance(one, int | float) and abs(one) < _LARGEST for one in values)


def _from_lines(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"image": "a.png", "lines": [{"text": "EXIT", "quad": [10, 20, 90, 20, 90, 40, 10, 40]}, …]}`, top line first.

    A line has `quad`, eight numbers, or `box`, four.
    """
    lines = _field(row, "lines")
    if not isinstance(lines, list) or not all(isinstance(line, Mapping) for line in lines):
        raise ValueError("expected a list of objects in 'lines'")
    if not lines:
        raise Unusable("a picture without lines of text")
    answer: list[Part] = [" "]
    for number, line in enumerate(lines):
        corners, name = (4, "quad") if "quad" in line else (2, "box")
        answer += [Reference(_text(line, "text")), content.region(_field(line, name), f"line {number}", corners)]
    return [*_pictures(row), "OCR with grounding:"], answer


def _from_text(row: Mapping) -> tuple[list[Part], list[Part]]:
    """`{"text": "…"}`, a document without pictures, so that a mixture of these rows has text, too."""
    text = _text(row, "text")
    if not text.strip():
        raise Unusable("a document without text")
    return [], [text]


KINDS: dict[str, Callable[[Mapping], tuple[list[Part], list[Part]]]] = {
    "pairs": _from_pair,
    "grounding": _from_grounded_pair,
    "documents": _from_document,
    "vqa": _from_question,
    "referring": _from_reference,
    "grounded_captions": _from_region,
    "ocr": _from_lines,
    "text": _from_text,
}
# Rows of well-known data sets, by the kind that they are examples of.
LAYOUTS: dict[str, dict[str, Callable[[Mapping], tuple[list[Part], list[Part]]]]] = {
    "grit": {"grounding": _from_grit},
    "refcoco": {"referring": _from_refcoco, "grounded_captions": _from_refcoco_region},
}


@dataclasses.dataclass(frozen=True)
class VisionChatRows:
    """How the rows of conversations with pictures become examples.

    Attributes:
        layout: a key of `CHAT_LAYOUTS`.
        loss_on: one of `chat.LOSS_ON`.
        system: system message of a conversation without one.
        num_queries: features of a picture, as the model's configuration says.
        label: text before each picture, see `content.with_labels`; the layout `released` writes its own.
    """

    layout: str = "messages"
    loss_on: str = "released"
    system: str = chatml.DEFAULT_SYSTEM
    num_queries: int = NUM_QUERIES
    label: str = PICTURE_LABEL

    def __post_init__(self):
        if self.layout not in CHAT_LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}: it must be one of {', '.join(CHAT_LAYOUTS)}")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on is {self.loss_on!r}: it must be one of {', '.join(LOSS_ON)}")

    def group(self, row: Mapping) -> str:
        """As of `VisionRows`."""
        with contextlib.suppress(ValueError):
            messages = CHAT_LAYOUTS[self.layout](row).messages
            return _first_picture([part for message in messages for part in message.parts], row)
        return _whole(row)

    def encode(self, row: Mapping, tokenizer: Tokenizer) -> Encoded:
        """See `chat.encode`; raises as it and the layout's reader do."""
        conversation = CHAT_LAYOUTS[self.layout](row)
        label = "" if self.layout == "released" else self.label
        return chat.encode(
            tokenizer,
            labelled(conversation, label),
            loss_on=self.loss_on,
            system=self.system,
            num_queries=self.num_queries,
        )


def labelled(conversation: Conversation, label: str = PICTURE_LABEL) -> Conversation:
    """A conversation whose pictures have labels; see `content.with_labels`."""
    contents = content.with_labels([message.parts for message in conversation.messages], label)
    messages = zip(conversation.messages, contents, strict=True)
    return dataclasses.replace(
        conversation, messages=tuple(dataclasses.replace(message, parts=tuple(parts)) for message, parts in messages)
    )


def from_released(row: Mapping) -> Conversation:
    """Reads rows of the released `finetune.py`: ShareGPT's layout, with tags in the text.

    `{"conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\\nWhat is it?"}, …]}`. Tags become
    control tokens, so use this layout only for files whose texts nobody else wrote.

    Raises:
        Unusable, ValueError: as `from_sharegpt` and `content.parse_tags`.
    """
    return from_sharegpt(row, _tagged)


def _tagged(value: object, where: str) -> Content:
    text = read_parts(value, where)
    if not isinstance(text, str):
        raise Unusable("content that is no text", where)
    parts = content.parse_tags(text, where)
    return text if all(isinstance(part, str) for part in parts) else parts


def from_llava(row: Mapping) -> Conversation:
    """Reads rows of LLaVA: ShareGPT's layout, `image` with a path or several, and `<image>` where each one stands.

    Line ends around `<image>` are taken away.

    Raises:
        Unusable: another number of `<image>` than of paths; or as `from_sharegpt`.
        ValueError: as `from_sharegpt`.
    """
    names = iter(_names(row) if row.get("image") or row.get("images") else [])
    conversation = from_sharegpt(row, lambda value, where: _with_pictures(value, where, names))
    if next(names, None) is not None:
        raise Unusable("more pictures than places for them")
    return conversation


def _with_pictures(value: object, where: str, names: Iterator[str]) -> Content:
    text = read_parts(value, where)
    if not isinstance(text, str):
        raise Unusable("content that is no text", where)
    first, *others = text.split("<image>")
    if not others:
        return text
    parts: list[Part] = [first.rstrip("\n")]
    for following in others:
        name = next(names, None)
        if name is None:
            raise Unusable("more places for pictures than pictures", where)
        parts += [Picture(name), following.strip("\n")]
    return tuple(part for part in parts if part)


CHAT_LAYOUTS: dict[str, Callable[[Mapping], Conversation]] = {
    "messages": lambda row: from_openai(row, read_parts),
    "released": from_released,
    "llava": from_llava,
}


def _pictures(row: Mapping) -> list[Picture]:
    return [Picture(name) for name in _names(row)]


def _names(row: Mapping) -> list[str]:
    # Parquet has both columns where some rows have several pictures.
    several = isinstance(row, Mapping) and "images" in row and (row["images"] is not None or "image" not in row)
    given = _field(row, "images" if several else "image")
    names = [given] if isinstance(given, str) else given
    if names == []:
        raise Unusable("a row without a picture")
    if isinstance(names, list) and None in names:
        raise Unusable("a field that is null", "images")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected the path of a picture, or a list of them, in 'image', found {given!r}")
    return names


def _boxes(row: Mapping) -> list[Part]:
    boxes = _field(row, "boxes")
    if not isinstance(boxes, list):
        raise ValueError(f"expected a list in 'boxes', found {type(boxes).__name__}")
    if not boxes:
        raise Unusable("a row without boxes")
    return [content.region(box, f"box {number}") for number, box in enumerate(boxes)]


def _spaced(answer: list[Part]) -> list[Part]:
    """An answer that begins with one space, inside the reference where that comes first."""
    first, *others = answer
    if isinstance(first, str):
        return [f" {first.lstrip()}", *others]
    if isinstance(first, Reference):
        return [Reference(f" {first.text.lstrip()}"), *others]
    return [" ", *answer]


def _text_of(part: Part) -> str:
    if isinstance(part, Reference):
        return part.text
    return part if isinstance(part, str) else ""


def _is_chinese(text: str) -> bool:
    return 2 * len(_HAN.findall(text)) > len(_LETTER.findall(text))


def _first_picture(parts: list[Part], row: Mapping) -> str:
    found = content.pictures(parts)
    return str(found[0].image) if found else _whole(row)


def _whole(row: object) -> str:
    # Parquet has dates and other values that JSON has not.
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def _field(row: object, name: str):
    if not isinstance(row, Mapping) or name not in row:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"expected a field {name!r}, found {found or 'no field'}")
    if row[name] is None:
        raise Unusable("a field that is null", name)
    return row[name]


def _text(row: Mapping, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"expected text in {name!r}, found {type(value).__name__}")
    return value
