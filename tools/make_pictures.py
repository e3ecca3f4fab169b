"""Draws pictures by rule, with captions, questions and dialogues: to train a small Qwen-VL on, and to measure it.

    python tools/make_pictures.py --output runs/vision/data
    python tools/make_pictures.py --output pictures --pairs 200 --tasks 200 --dialogues 100 --held_out 20 --seed 7

A picture shows one or two different shapes, several of one kind, or a sign with Latin letters or Chinese characters.
Each thing stands in a cell of a 3 by 3 grid; sizes and places within it vary. Half of the text is Chinese.

    pairs.jsonl       a picture and its caption: stage 1. Half of the captions are maps, in the language "grid"
    tasks.jsonl       a picture and several tasks about it: stage 2. Describe it, name the cells, answer, find a thing
                      (boxes), name the thing in a box, read a sign; and conversations without a picture
    dialogues.jsonl   conversations about one picture, or comparing two: stage 3
    text.jsonl        descriptions with questions and answers, without pictures: for the base model. Most descriptions
                      are maps: the 9 cells, row by row, with a word for each. Some compare two maps
    maps.jsonl        conversations as those with pictures, with maps in their place: for the base model
    replay.jsonl      more of text.jsonl, for stages 2 and 3, so that text is not forgotten
    frame.jsonl       the words around every conversation and those of maps, for the vocabulary
    held_out/         questions.jsonl, with the answer as the last message; text.jsonl, as above
    pictures/         the pictures, a folder for each file of rows

No sign of the held-out questions is in another file. The same seed gives the same files.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from picture_words import COLOR_NAMES, GRID, LANGUAGES, SHAPES
from PIL import Image, ImageDraw

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.data.chatml import DEFAULT_SYSTEM

SIDE = 96  # of a picture, in pixels
ACROSS = 3  # cells in a row of the grid, and in a column
# Each thing and each character stands in a cell of a 3 by 3 grid, of any size and place that fit: what a model of this
# size can learn to see in minutes.
CELL = SIDE // ACROSS
SIZES = (22, 28)  # of a thing
GLYPH = 22
INK = (245, 245, 245)  # of signs
BACKGROUNDS = ((124, 118, 106), (116, 120, 112), (130, 116, 104), (120, 112, 116))  # near the mean of CLIP
MOST_THINGS = 2
MOST_ALIKE = 3
HELD_OUT_SIGNS = 5  # one of so many

COLORS = dict(zip(COLOR_NAMES, ((215, 40, 40), (40, 160, 60), (45, 80, 225), (235, 200, 20)), strict=True))
# Letters of colors and shapes on maps.
LETTERS = {"red": "r", "green": "g", "blue": "b", "yellow": "y"}
LETTERS |= {"circle": "c", "square": "s", "triangle": "t"}
# Of the 9 cells, row by row: a decoder with rotary positions alone would have to count them.
CELLS = "abcdefghi"
# Strokes on a grid of 9 by 9 points, x and y of both ends: no font that comes with Python packages has Chinese.
STROKES = {
    "A": "0 8 4 0, 4 0 8 8, 2 5 6 5",
    "C": "8 0 1 0, 1 0 1 8, 1 8 8 8",
    "H": "1 0 1 8, 7 0 7 8, 1 4 7 4",
    "K": "1 0 1 8, 7 0 1 4, 1 4 7 8",
    "L": "1 0 1 8, 1 8 7 8",
    "S": "7 0 1 0, 1 0 1 4, 1 4 7 4, 7 4 7 8, 7 8 1 8",
    "T": "0 0 8 0, 4 0 4 8",
    "X": "0 0 8 8, 8 0 0 8",
    "一": "0 4 8 4",
    "三": "1 0 7 0, 1 4 7 4, 0 8 8 8",
    "十": "0 4 8 4, 4 0 4 8",
    "口": "1 1 7 1, 7 1 7 8, 7 8 1 8, 1 8 1 1",
    "田": "0 0 8 0, 8 0 8 8, 8 8 0 8, 0 8 0 0, 0 4 8 4, 4 0 4 8",
    "山": "4 0 4 8, 0 3 0 8, 8 3 8 8, 0 8 8 8",
    "人": "4 0 4 2, 4 2 0 8, 4 2 8 8",
    "下": "0 0 8 0, 4 0 4 8, 4 3 7 5",
}
SIGNS = {"en": [one for one in STROKES if one.isascii()], "zh": [one for one in STROKES if not one.isascii()]}
SIGN_LENGTH = 2


Part = dict
# What stands around every conversation: given to the vocabulary with weight, so that it takes few tokens.
FRAME = f"system\n{DEFAULT_SYSTEM}\nuser\nPicture 1: \nassistant\n"
# Each thing on a map is to be one token.
CODES = "".join(f" {LETTERS[color]}{LETTERS[shape]}{cell}" for color in COLORS for shape in SHAPES for cell in CELLS)
# The kinds of questions, in the order of the held-out file.
KINDS = ("describe", "cells", "color", "shape", "count", "place", "find", "name", "read", "compare")
# Kinds that a description in words does not answer.
EXACT = ("cells", "find", "name")
TWO_MAPS = 0.15  # of the rows of text.jsonl and maps.jsonl compare two maps
MAPPED = 0.8  # of the other descriptions of text.jsonl are maps, not sentences
GRIDS = 0.5  # of pairs.jsonl, and of the maps of text.jsonl, have such captions
COMPARED = 0.6  # of the dialogues are about two pictures


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape on a picture; `box` is its left, top, right and bottom in pixels."""

    color: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        """x and y, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def cell(self) -> int:
        """The cell that its center is in, counted row by row."""
        x, y = self.center
        return ACROSS * (int(y) // CELL) + int(x) // CELL

    @property
    def thousandths(self) -> list[int]:
        """The box in thousandths of the picture's sides, integers in [0, 1000)."""
        return [min(side * 1000 // SIDE, 999) for side in self.box]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
      things: from left to right; all different in color and in shape, or all alike.
      sign: what is written there, empty where there is no sign.
      corner: left and top of the first character; the others stand a cell apart.
    """

    background: tuple[int, int, int]
    things: tuple[Thing, ...] = ()
    sign: str = ""
    corner: tuple[int, int] = (0, 0)

    def centered(self) -> "Scene":
        """The same things, each in the middle of its cell, and of the middle size: all that a map tells."""
        size = sum(SIZES) // 2
        corners = (tuple(int(side) // CELL * CELL + (CELL - size) // 2 for side in one.center) for one in self.things)
        boxes = ((left, top, left + size, top + size) for left, top in corners)
        things = (dataclasses.replace(thing, box=box) for thing, box in zip(self.things, boxes, strict=True))
        return dataclasses.replace(self, things=tuple(things))

    @property
    def alike(self) -> bool:
        """Whether it shows several things of one kind."""
        return len(self.things) > 1 and len({(one.color, one.shape) for one in self.things}) == 1

    @property
    def map(self) -> str:
        """The 9 cells row by row, a word each: `.`, letters of a thing and its cell, or a character of a sign."""
        cells = {}
        for thing in self.things:
            cells[thing.cell] = f"{LETTERS[thing.color]}{LETTERS[thing.shape]}{CELLS[thing.cell]}"
        for index, glyph in enumerate(self.sign):
            cells[ACROSS * (self.corner[1] // CELL) + self.corner[0] // CELL + index] = glyph
        return "".join(f" {cells.get(cell, '.')}" for cell in range(len(CELLS)))

    def drawn(self) -> Image.Image:
        """The picture, RGB, SIDE x SIDE."""
        image = Image.new("RGB", (SIDE, SIDE), self.background)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw_shape(pen, thing)
        for index, glyph in enumerate(self.sign):
            left, top = self.corner[0] + index * CELL, self.corner[1]
            for stroke in STROKES[glyph].split(","):
                numbers = [float(number) * GLYPH / 8 for number in stroke.split()]
                ends = [(left + numbers[0], top + numbers[1]), (left + numbers[2], top + numbers[3])]
                pen.line(ends, INK, 4)
        return image


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, right, bottom = thing.box
    fill = COLORS[thing.color]
    if thing.shape == "circle":
        pen.ellipse(thing.box, fill)
    elif thing.shape == "square":
        pen.rectangle(thing.box, fill)
    else:
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill)


def held_out_sign(sign: str) -> bool:
    """Whether a sign is kept for the held-out questions; its characters decide, so that nobody needs a list.

    Both orders of two characters are kept, or none: a model that knows one of them would otherwise learn that the other
    does not occur.
    """
    return sum(list(STROKES).index(glyph) for glyph in sign) % HELD_OUT_SIGNS == 0


class Maker:
    """Makes scenes and what is said about them, all from one seed."""

    def __init__(self, seed: int, part: str, held_out: bool = False):
        self.draw = random.Random(f"{seed}/{part}")
        self._held_out = held_out

    def different(self, count: int) -> Scene:
        """Things that differ in color and in shape."""
        colors, shapes = self.draw.sample(sorted(COLORS), count), self.draw.sample(SHAPES, count)
        return self._scene(list(zip(colors, shapes, strict=True)))

    def alike(self, count: int) -> Scene:
        """Several things of one kind."""
        return self._scene([self._kind()] * count)

    def sign(self, language: str) -> Scene:
        """A sign in a language."""
        while True:
            sign = "".join(self.draw.choice(SIGNS[language]) for _ in range(SIGN_LENGTH))
            if held_out_sign(sign) == self._held_out:
                break
        column, row = self.draw.randint(0, ACROSS - len(sign)), self.draw.randrange(ACROSS)
        corner = tuple(CELL * cell + self.draw.randint(2, CELL - GLYPH - 4) for cell in (column, row))
        return Scene(self.draw.choice(BACKGROUNDS), sign=sign, corner=(corner[0], corner[1]))

    def any(self, language: str) -> Scene:
        """A scene of any sort."""
        sort = self.draw.random()
        if sort < 0.3:
            return self.sign(language)
        return self.alike(self.draw.randint(2, MOST_ALIKE)) if sort < 0.45 else self.different(self._few())

    def two(self) -> tuple[Scene, Scene]:
        """Two scenes to compare, each of one thing or several alike; color, shape and number agree half of the time."""
        (color, shape), number = self._kind(), self.draw.randint(1, 3)
        first = self._scene([(color, shape)] * number)
        (other_color, other_shape), other_number = self._kind(), self.draw.randint(1, 3)
        color = color if self.draw.random() < 0.4 else other_color
        shape = shape if self.draw.random() < 0.35 else other_shape
        number = number if self.draw.random() < 0.25 else other_number
        return first, self._scene([(color, shape)] * number)

    def _kind(self) -> tuple[str, str]:
        return self.draw.choice(sorted(COLORS)), self.draw.choice(SHAPES)

    def _few(self) -> int:
        return self.draw.choice((1, 1, MOST_THINGS))

    def _scene(self, things: Sequence[tuple[str, str]]) -> Scene:
        """Things of these colors and shapes in columns of their own, or, where they are alike, anywhere."""
        cells = [(column, row) for column in range(ACROSS) for row in range(ACROSS)]
        if len(set(things)) == len(things):
            columns = sorted(self.draw.sample(range(ACROSS), len(things)))
            places = [(column, self.draw.randrange(ACROSS)) for column in columns]
        else:
            places = sorted(self.draw.sample(cells, len(things)))
        made = tuple(Thing(*kind, self._box(*place)) for kind, place in zip(things, places, strict=True))
        return Scene(self.draw.choice(BACKGROUNDS), made)

    def _box(self, column: int, row: int) -> tuple[int, int, int, int]:
        size = self.draw.randint(*SIZES)
        left, top = (CELL * cell + self.draw.randint(1, CELL - 2 - size) for cell in (column, row))
        return left, top, left + size, top + size


class Speaker:
    """Says things about scenes in one language."""

    def __init__(self, language: str, draw: random.Random):
        self.words, self._draw = LANGUAGES[language], draw

    def named(self, thing: Thing) -> str:
        """Color and shape."""
        return self.words.thing.format(color=self.words.colors[thing.color], shape=self.words.shapes[thing.shape])

    def caption(self, scene: Scene) -> str:
        """All that a picture shows, from left to right."""
        words = self.words
        if scene.sign:
            return words.sign.format(" ".join(scene.sign))
        if scene.alike:
            first = scene.things[0]
            names = {"color": words.colors[first.color], "shape": words.plurals[first.shape]}
            return words.several.format(number=words.numbers[len(scene.things)], **names)
        places = (words.at.format(thing=self.named(one), place=words.places[one.cell]) for one in scene.things)
        return words.comma.join(places)

    def ask(self, kind: str, scene: Scene) -> tuple[list[Part], list[Part]]:
        """A question of a kind about a scene and its answer, both as parts of content."""
        words, pick = self.words, self._draw.choice
        thing = pick(scene.things) if scene.things else None
        if kind == "describe":
            return [text(pick(words.describe))], [text(self.caption(scene))]
        if kind == "cells":
            return [text(words.cells)], [text(scene.map)]
        if kind == "read":
            return [text(pick(words.read))], [text(" ".join(scene.sign))]
        assert thing is not None
        color, shape = words.colors[thing.color], words.shapes[thing.shape]
        if kind == "find":
            name = self.named(thing)
            return [text(pick(words.find).format(thing=name))], [box(thing, name)]
        if kind == "name":
            before, after = words.name.split("{box}")
            around = [text(before), box(thing), text(after)]
            return [part for part in around if part.get("text") != ""], [text(self.named(thing))]
        question, answer = {
            "color": (words.color.format(shape=shape), color),
            "shape": (words.shape.format(color=color), shape),
            "count": (words.count, words.numbers[len(scene.things)]),
            "place": (words.place.format(shape=shape), words.places[thing.cell]),
        }[kind]
        return [text(question)], [text(answer)]

    def several(self, asked: Sequence[str], scene: Scene, count: int) -> list[tuple[list[Part], list[Part]]]:
        """`count` questions and answers of the kinds `asked`, each kind once before one comes again."""
        order = [kind for _ in range(count) for kind in self._draw.sample(asked, len(asked))]
        return [self.ask(kind, scene) for kind in order[:count]]

    def compare(self, about: str, scenes: Sequence[Scene]) -> tuple[list[Part], list[Part]]:
        """A question about two scenes of one thing, or of several alike, and its answer."""
        words = self.words
        seen = []
        for scene in scenes:
            thing = scene.things[0]
            values = {"color": words.colors[thing.color], "shape": words.shapes[thing.shape]}
            seen.append((values | {"number": words.numbers[len(scene.things)]})[about])
        answer = words.verdict.format(*seen, words.same[seen[0] == seen[1]])
        return [text(words.compare[about])], [text(answer)]


def text(content: str) -> Part:
    """A part of text."""
    return {"type": "text", "text": content}


def box(thing: Thing, ref: str | None = None) -> Part:
    """A part with the box of a thing, and the phrase that it grounds."""
    named = {} if ref is None else {"ref": ref}
    return {"type": "box", **named, "boxes": [thing.thousandths]}


def kinds(scene: Scene) -> list[str]:
    """The kinds of questions that a scene has one answer to."""
    if scene.sign:
        return ["describe", "cells", "read"]
    if scene.alike:
        return ["describe", "cells", "count", "color", "shape"]
    return ["describe", "cells", "color", "shape", "count", "place", "find", "name"]


class Writer:
    """Makes rows, and the pictures that they name, in a folder."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed = folder, seed

    def pairs(self, count: int) -> Iterator[dict]:
        """A picture and its caption."""
        for index, (maker, language, speaker) in enumerate(self._speakers("pairs", count)):
            scene = maker.any(language)
            row = {"image": self._picture("pairs", f"{index}", scene)}
            if maker.draw.random() < GRIDS:
                yield row | {"text": scene.map.strip(), "language": GRID}
            else:
                yield row | {"text": speaker.caption(scene)}

    def tasks(self, count: int, turns: int, text_share: float) -> Iterator[dict]:
        """A picture and `turns` tasks about it; or a description in words instead of the picture."""
        for index, (maker, language, speaker) in enumerate(self._speakers("tasks", count)):
            scene = maker.any(language)
            if maker.draw.random() < text_share:
                opening = [text(speaker.caption(scene) + "\n")]
                asked = [kind for kind in kinds(scene) if kind not in EXACT]
            else:
                opening = [self._image("tasks", f"{index}", scene)]
                asked = kinds(scene)
            yield {"messages": conversation(opening, speaker.several(asked, scene, turns))}

    def dialogues(self, count: int, turns: int) -> Iterator[dict]:
        """Two pictures and a comparison with its parts, or one picture and questions."""
        for index, (maker, language, speaker) in enumerate(self._speakers("dialogues", count)):
            if maker.draw.random() < COMPARED:
                scenes, about = maker.two(), list(speaker.words.compare)
                maker.draw.shuffle(about)
                opening = [self._image("dialogues", f"{index}_{place}", one) for place, one in enumerate(scenes)]
                said = [speaker.compare(one, scenes) for one in about]
            else:
                scene = maker.any(language)
                opening, said = (
                    [self._image("dialogues", f"{index}", scene)],
                    speaker.several(kinds(scene), scene, turns),
                )
            yield {"messages": conversation(opening, said)}

    def maps(self, count: int, turns: int) -> Iterator[dict]:
        """Dialogues as those with pictures, with maps in their place; boxes are the middles of cells."""
        for maker, language, speaker in self._speakers("maps", count):
            if maker.draw.random() < TWO_MAPS:
                scenes, about = maker.two(), list(speaker.words.compare)
                maker.draw.shuffle(about)
                said = [speaker.compare(one, scenes) for one in about]
            else:
                scenes = (maker.any(language).centered(),)
                # Fewer than of a picture: later answers could be had from earlier ones.
                said = speaker.several(kinds(scenes[0]), scenes[0], max(1, turns - 1))
            opening = [text(f"Picture {number}:{scene.map}\n") for number, scene in enumerate(scenes, 1)]
            yield {"messages": conversation(opening, said)}

    def questions(self, count: int) -> Iterator[dict]:
        """`count` questions of each kind on held-out pictures, with `kind` and `language`."""
        for kind in KINDS:
            for index, (maker, language, speaker) in enumerate(
                self._speakers(f"held_out_{kind}", count, held_out=True)
            ):
                name, about = f"{kind}_{index}", None
                if kind == "compare":
                    scenes, about = maker.two(), maker.draw.choice(list(speaker.words.compare))
                    opening = [self._image("held_out", f"{name}_{place}", one) for place, one in enumerate(scenes)]
                    said = speaker.compare(about, scenes)
                else:
                    scene = maker.any(language)
                    while kind not in kinds(scene):
                        scene = maker.any(language)
                    opening, said = [self._image("held_out", name, scene)], speaker.ask(kind, scene)
                for part in opening:
                    part["image"] = f"../{part['image']}"
                yield {"kind": kind, "language": language, "messages": conversation(opening, [said])}

    def texts(self, part: str, count: int, turns: int) -> Iterator[dict]:
        """Descriptions, which are repeated, with questions and answers below them; words are those of the stages."""
        for maker, language, speaker in self._speakers(part, count):
            if maker.draw.random() < TWO_MAPS:
                scenes = maker.two()
                lines = [scene.map for scene in scenes]
                said = [speaker.compare(about, scenes) for about in speaker.words.compare]
            else:
                scene = maker.any(language)
                asked = [kind for kind in kinds(scene) if kind not in EXACT]
                caption = speaker.caption(scene)
                mapped = maker.draw.random() < MAPPED
                language, told = speaker.words.name_of_language, caption
                if mapped and maker.draw.random() < GRIDS:
                    language, told = GRID, scene.map.strip()
                lines = [scene.map if mapped else caption, f"Generate the caption in {language}: {told}"]
                said = speaker.several(asked, scene, turns)
            for question, answer in said:
                lines.append(f"{question[0]['text']} Answer: {answer[0]['text']}")
            yield {"text": "\n".join(lines)}

    def _speakers(self, part: str, count: int, held_out: bool = False) -> Iterator[tuple[Maker, str, Speaker]]:
        maker = Maker(self._seed, part, held_out)
        for _ in range(count):
            language = maker.draw.choice(sorted(LANGUAGES))
            yield maker, language, Speaker(language, maker.draw)

    def _image(self, part: str, name: str, scene: Scene) -> Part:
        return {"type": "image", "image": self._picture(part, name, scene)}

    def _picture(self, part: str, name: str, scene: Scene) -> str:
        """Draws a picture; returns its path, relative to the folder."""
        place = Path("pictures") / part / f"{name}.png"
        (self._folder / place).parent.mkdir(parents=True, exist_ok=True)
        scene.drawn().save(self._folder / place, compress_level=1)
        return place.as_posix()


def conversation(opening: list[Part], said: Sequence[tuple[list[Part], list[Part]]]) -> list[dict]:
    """Messages: `opening` before the first question, then questions and answers in turn."""
    messages = []
    for question, answer in said:
        messages.append({"role": "user", "content": [*opening, *question]})
        messages.append({"role": "assistant", "content": answer})
        opening = []
    return messages


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="folder for all files")
    for name, count, what in (
        ("pairs", 16_000, "lines of pairs.jsonl"),
        ("tasks", 8_000, "lines of tasks.jsonl"),
        ("dialogues", 3_000, "lines of dialogues.jsonl"),
        ("texts", 8_000, "lines of text.jsonl; maps.jsonl has twice as many"),
        ("held_out", 60, "held-out questions of each kind"),
        ("turns", 4, "questions about one picture"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{what} (default: %(default)s)")
    parser.add_argument("--text_share", type=float, default=0.1, help="of tasks.jsonl without picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    asked = parser.parse_args(argv)
    turns = asked.turns
    if min(asked.pairs, asked.tasks, asked.dialogues, asked.texts, asked.held_out, turns) < 1:
        raise ValueError("--pairs, --tasks, --dialogues, --texts, --held_out and --turns must be at least 1")
    if not 0 <= asked.text_share <= 1:
        raise ValueError(f"--text_share is {asked.text_share}: it must be between 0 and 1")
    writer = Writer(asked.output, asked.seed)
    for name, rows in (
        ("pairs", writer.pairs(asked.pairs)),
        ("tasks", writer.tasks(asked.tasks, turns, asked.text_share)),
        ("dialogues", writer.dialogues(asked.dialogues, turns)),
        ("text", writer.texts("text", asked.texts, turns)),
        ("maps", writer.maps(2 * asked.texts, turns)),
        ("replay", writer.texts("replay", max(1, asked.texts // 4), turns)),
        ("held_out/questions", writer.questions(asked.held_out)),
        ("held_out/text", writer.texts("held_out_text", max(1, asked.texts // 20), turns)),
    ):
        path, written = asked.output / f"{name}.jsonl", 0
        with files.new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
        print(f"{path}: {written:,} rows", flush=True)
    files.write_json(asked.output / "frame.jsonl", {"text": FRAME + CODES}, indent=None)


if __name__ == "__main__":
    run(main)
