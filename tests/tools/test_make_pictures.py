"""Pictures made by rule: what the rows say is what the pixels show, and nothing held out is in training."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

COUNTS = ("--pairs=60", "--tasks=60", "--dialogues=40", "--texts=40", "--held_out=8", "--text_share=0.2")


@pytest.fixture(scope="module")
def pictures(tool):
    return tool("make_pictures")


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pictures.main(["--output", f"{folder}", "--seed=3", *COUNTS])
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parts(row: dict) -> list[dict]:
    return [part for message in row["messages"] for part in message["content"]]


def said(row: dict) -> str:
    return "".join(part.get("text", "") for part in parts(row))


def blobs(path: Path, pictures) -> list[tuple[str, tuple[int, ...]]]:
    """Color and box of each connected area of one of the colors, found by scipy."""
    pixels = np.asarray(Image.open(path))
    found = []
    for name, color in pictures.COLORS.items():
        labels, _ = ndimage.label((pixels == color).all(axis=-1))
        for rows, columns in ndimage.find_objects(labels):
            found.append((name, (columns.start, rows.start, columns.stop - 1, rows.stop - 1)))
    return found


def test_the_same_seed_gives_the_same_files(made, pictures, tmp_path):
    pictures.main(["--output", f"{tmp_path}", "--seed=3", *COUNTS])
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in (made, tmp_path)
    )
    assert first == second and len(first) > 200
    pictures.main(["--output", f"{tmp_path}", "--seed=4", *COUNTS])
    assert (tmp_path / "pairs.jsonl").read_bytes() != first[Path("pairs.jsonl")]


def test_boxes_are_where_the_things_are(made, pictures):
    checked = 0
    for row in read(made / "held_out/questions.jsonl"):
        for part in parts(row):
            if part["type"] == "box":
                image = made / "held_out" / parts(row)[0]["image"]
                box = [side * pictures.SIDE / 1000 for side in part["boxes"][0]]
                nearest = min(
                    blobs(image, pictures), key=lambda blob: sum(abs(a - b) for a, b in zip(blob[1], box, strict=True))
                )
                assert np.abs(np.array(nearest[1]) - box).max() < 2
                words = part.get("ref") or said(row)
                assert any(language.colors[nearest[0]] in words for language in pictures.LANGUAGES.values())
                assert all(0 <= side < 1000 for side in part["boxes"][0])
                checked += 1
    assert checked == 16  # eight to find, eight to name


def test_counts_and_colors_are_those_of_the_pixels(made, pictures):
    for row in read(made / "held_out/questions.jsonl"):
        if row["kind"] in ("count", "color"):
            seen = blobs(made / "held_out" / parts(row)[0]["image"], pictures)
            language, answer = pictures.LANGUAGES[row["language"]], parts(row)[-1]["text"]
            if row["kind"] == "count":
                assert answer == language.numbers[len(seen)]
            else:
                assert answer in {language.colors[color] for color, _ in seen}


def test_comparisons_say_what_both_pictures_show(made, pictures):
    rows = [row for row in read(made / "dialogues.jsonl") if sum(part["type"] == "image" for part in parts(row)) == 2]
    verdicts = []
    for row in rows:
        both = [blobs(made / part["image"], pictures) for part in parts(row)[:2]]
        language = next(one for one in pictures.LANGUAGES.values() if one.compare["color"] in said(row))
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            asked, answer = question["content"][-1]["text"], answer["content"][0]["text"]
            if asked == language.compare["color"]:
                first, second = (language.colors[seen[0][0]] for seen in both)
            elif asked == language.compare["number"]:
                first, second = (language.numbers[len(seen)] for seen in both)
            else:
                continue
            assert answer == language.verdict.format(first, second, language.same[first == second])
            verdicts.append(first == second)
    assert 0.2 < np.mean(verdicts) < 0.8


def test_maps_have_a_word_for_each_cell_of_the_picture(pictures):
    maker = pictures.Maker(0, "maps")
    for scene in [maker.any("en") for _ in range(40)]:
        words = scene.map.split()
        assert len(words) == len(pictures.CELLS) == 9
        pixels = np.asarray(scene.drawn())
        for index, word in enumerate(words):
            top, left = (pictures.CELL * cell for cell in divmod(index, pictures.ACROSS))
            cell = pixels[top : top + pictures.CELL, left : left + pictures.CELL]
            inks = {name for name, color in pictures.COLORS.items() if (cell == color).all(axis=-1).any()}
            if word in pictures.STROKES:
                assert word in scene.sign and (cell == pictures.INK).all(axis=-1).any()
            else:
                assert inks == {name for name in pictures.COLORS if pictures.LETTERS[name] == word[0]}, word


def test_captions_of_the_language_grid_are_maps_of_their_pictures(made, pictures):
    rows = read(made / "pairs.jsonl")
    maps = [row for row in rows if row.get("language") == pictures.GRID]
    assert 0.3 < len(maps) / len(rows) < 0.7
    for row in maps:
        words, shown = row["text"].split(), {}
        for color, (left, top, _, _) in blobs(made / row["image"], pictures):
            shown[pictures.ACROSS * (top // pictures.CELL) + left // pictures.CELL] = pictures.LETTERS[color]
        told = {cell: word[0] for cell, word in enumerate(words) if word != "." and word not in pictures.STROKES}
        assert len(words) == 9 and told == shown


def test_dialogues_about_maps_tell_no_more_than_maps(made, pictures):
    asked = 0
    for row in read(made / "maps.jsonl"):
        (question, answer), maps = row["messages"][:2], []
        for part in question["content"]:
            if part.get("text", "").startswith("Picture "):
                maps.append(part["text"].split(":", 1)[1].split())
        assert len(maps) in (1, 2) and all(len(one) == 9 for one in maps)
        for answer in row["messages"][1::2]:
            for part in answer["content"]:
                for left, top, right, bottom in part.get("boxes", []):
                    cells = [index for index, word in enumerate(maps[0]) if word.endswith(pictures.CELLS[index])]
                    row_of, column = ((one * 3) // 2000 for one in (top + bottom, left + right))
                    assert 3 * row_of + column in cells
                    assert abs((right - left) - (bottom - top)) <= 1  # each is rounded to thousandths
                    asked += 1
    assert asked
    kept = [one + other for one in pictures.SIGNS["zh"] for other in pictures.SIGNS["zh"]]
    kept = {sign for sign in kept if pictures.held_out_sign(sign)}
    assert 0 < len(kept) < len(pictures.SIGNS["zh"]) ** 2 / 3 and kept == {sign[::-1] for sign in kept}


def test_texts_compare_maps_as_dialogues_compare_pictures(made, pictures):
    texts = [row["text"].split("\n") for row in read(made / "text.jsonl")]
    compared = [lines for lines in texts if lines[1].count(" ") == 9]
    assert 0 < len(compared) < len(texts) / 2
    for first, second, *said in compared:
        things = [{word for word in line.split() if word != "."} for line in (first, second)]
        for line in said:
            for language in pictures.LANGUAGES.values():
                if line.startswith(language.compare["color"]):
                    same = len({thing[0] for both in things for thing in both}) == 1
                    assert line.endswith(language.same[same])


def test_every_kind_is_held_out_and_no_sign_of_it_is_trained_on(made, pictures):
    rows = read(made / "held_out/questions.jsonl")
    assert [row["kind"] for row in rows] == [kind for kind in pictures.KINDS for _ in range(8)]
    assert {row["language"] for row in rows} == {"en", "zh"}
    signs = {parts(row)[-1]["text"] for row in rows if row["kind"] == "read"}
    assert len(signs) > 4 and all(pictures.held_out_sign(sign.replace(" ", "")) for sign in signs)
    training = "".join(
        (made / f"{name}.jsonl").read_text() for name in ("pairs", "tasks", "dialogues", "text", "maps", "replay")
    )
    # In captions, answers and maps the characters of a sign stand beside each other, a blank between them.
    possible = {f"{one} {other}" for every in pictures.SIGNS.values() for one in every for other in every}
    written = {sign for sign in possible if sign in training}
    assert len(written) > 20 and not [sign for sign in written if pictures.held_out_sign(sign.replace(" ", ""))]


def test_each_conversation_has_a_question_where_one_is_asked_for(pictures, tmp_path):
    few = ("--pairs=1", "--tasks=8", "--dialogues=8", "--texts=20", "--held_out=1")
    pictures.main(["--output", f"{tmp_path}", "--turns=1", *few])
    for name in ("tasks", "dialogues", "maps"):
        assert all(row["messages"] for row in read(tmp_path / f"{name}.jsonl"))


def test_rows_name_pictures_that_exist_and_some_tasks_have_none(made):
    for name in ("pairs", "tasks", "dialogues"):
        rows = read(made / f"{name}.jsonl")
        named = [part["image"] for row in rows for part in ([row] if "image" in row else parts(row)) if "image" in part]
        assert len(named) == len(set(named)) and all((made / one).is_file() for one in named)
    tasks = read(made / "tasks.jsonl")
    without = [row for row in tasks if not any(part["type"] == "image" for part in parts(row))]
    assert 2 < len(without) < 30
    assert not [part for row in without for part in parts(row) if part["type"] == "box"]


def test_signs_are_drawn_whole_and_differ(pictures):
    furthest = pictures.SIDE - 2 * pictures.CELL + pictures.CELL - pictures.GLYPH - 4
    drawn = set()
    for glyph in pictures.STROKES:
        images = [
            np.asarray(pictures.Scene(pictures.BACKGROUNDS[0], sign=glyph * 2, corner=(at, at)).drawn())
            for at in (2, furthest)
        ]
        inks = [np.argwhere((image == pictures.INK).all(axis=-1)) for image in images]
        assert len(inks[0]) == len(inks[1]) > 60, glyph  # nothing is cut at the edges
        drawn.add(images[0].tobytes())
    assert len(drawn) == len(pictures.STROKES)


@pytest.mark.parametrize("wrong", ["--pairs=0", "--text_share=1.5", "--turns=-1"])
def test_bad_numbers_are_refused_before_anything_is_written(pictures, wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong.split("=")[0]):
        pictures.main(["--output", f"{tmp_path / 'new'}", wrong])
    assert not (tmp_path / "new").exists()
