"""tools/vision.py asserts its claims, and tools/measure_vision.py counts what is right."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from qwen_jax import files
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.models.vision.config import VisionConfig

COLUMNS = ("caption", "cells", "question", "box", "name", "reading", "comparison")


def measured(**changed) -> dict[str, dict[str, float]]:
    """Figures with which every claim of tools/vision.py holds, but for those given as model_column."""
    found = {
        name: dict.fromkeys(COLUMNS, 0.0 if name in ("before", "blank") else 1.0) | {"text": 1.0}
        for name in ("before", "stage1", "stage2", "stage3", "blank")
    }
    for key, value in changed.items():
        model, column = key.split("_")
        found[model][column] = value
    return found


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({}, []),
        ({"before_caption": 0.5}, [0]),
        ({"stage1_caption": 0.0}, [1]),
        ({"stage2_question": 0.0}, [2]),
        ({"stage2_box": 0.0}, [3]),
        ({"stage2_reading": 0.0}, [4]),
        ({"stage3_comparison": 0.0}, [5]),
        ({"stage3_text": 9.0}, [6]),
        ({"blank_question": 1.0}, [7]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_claim_that_does_not_hold_fails(tool, changed, failed):
    claims = tool("vision").claims(measured(**changed))
    assert [index for index, (_, true) in enumerate(claims) if not true] == failed


def test_each_stage_starts_from_the_one_before_and_none_shares_a_cache_of_other_rows(tool, tmp_path):
    steps = [step.words for step in tool("vision").steps(tmp_path, 0, False, [])]
    trained = [words for words in steps if "qwen_jax.train" in words]

    def setting(words, name):
        return next(word.partition("=")[2] for word in words if word.startswith(f"--gin.{name}="))

    outputs = [setting(words, "OUTPUT_DIR") for words in trained]
    assert [name.rpartition("/")[2] for name in outputs] == ["base", "before", "stage1", "stage2", "stage3"]
    starts = [setting(words, "INITIAL_CHECKPOINT").rpartition("/")[2] for words in trained[1:]]
    assert starts == ["base", "base", "stage1", "stage2"]
    assert len({setting(words, "CACHE_DIR") for words in trained}) == 4
    asked = [words for words in steps if "tools/measure_vision.py" in words]
    assert len({words[words.index("--questions") + 1] for words in asked}) == 1 and len(asked) == 5


def test_table_and_picture_are_made_of_what_was_measured(tool, tmp_path):
    vision, make = tool("vision"), tool("make_pictures")
    make.main(["--output", f"{tmp_path}/data", *"--pairs=1 --tasks=1 --dialogues=1 --texts=1 --held_out=6".split()])
    measure = tool("measure_vision")
    questions = measure.read_questions(tmp_path / "data/held_out/questions.jsonl")
    for name in vision.MODELS:
        folder = tmp_path / "measured" / name
        folder.mkdir(parents=True)
        answers = [one["reference"] if name == "stage3" else "?" for one in questions]
        measure.write(folder, questions, answers)
        files.write_json(folder / "perplexity.json", {"groups": [{"bits_per_byte": 0.25}]})
    found = vision.figures(tmp_path)
    assert set(found["stage3"].values()) == {1.0, 0.25} and set(found["stage1"].values()) == {0.0}
    assert f"| after stage 3 | {'100.0% | ' * 7}0.250 |\n" in vision.table(found)
    vision.draw(vision.shown(tmp_path), tmp_path / "vision.png")
    pixels = np.asarray(Image.open(tmp_path / "vision.png").convert("RGB"))
    shares = [
        (np.abs(pixels - np.array(color)).max(axis=-1) < 40).mean() for color in (make.BACKGROUNDS[0], (255, 0, 255))
    ]
    assert shares[0] > 0.1 and shares[1] > 0.0001  # pictures, and boxes of answers


@pytest.mark.parametrize(
    ("kind", "answer", "reference", "expected"),
    [
        ("color", "red", "red", True),
        ("color", "red circle", "red", False),
        ("find", "<ref>a</ref><box>(10,10),(110,110)</box>", "<ref>a</ref><box>(0,0),(100,100)</box>", True),
        ("find", "<ref>a</ref><box>(50,50),(150,150)</box>", "<ref>a</ref><box>(0,0),(100,100)</box>", False),
        ("find", "<ref>a</ref>", "<ref>a</ref><box>(0,0),(100,100)</box>", False),
        ("compare", "red, blue: no", "red, green: no", True),
        ("compare", "红色，红色：相同", "红色，蓝色：不同", False),
        ("describe", "red, blue: no", "red, green: no", False),
    ],
)
def test_what_counts_as_right(tool, kind, answer, reference, expected):
    assert tool("measure_vision").right(kind, answer, reference) is expected


def test_a_missing_picture_is_named_before_a_model_is_loaded(tool, tmp_path):
    picture = {"type": "image", "image": "gone.png"}
    row = {"messages": [{"role": "user", "content": [picture]}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(FileNotFoundError, match=r"questions.jsonl:1: no picture .*gone.png"):
        tool("measure_vision").read_questions(tmp_path / "questions.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        [],
        {},
        {"messages": []},
        {"messages": ["hi"]},
        {"messages": [{"content": "a"}]},
        {"messages": [{"role": "assistant"}]},
    ],
)
def test_a_line_without_such_messages_is_named(tool, tmp_path, row):
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"questions.jsonl:1: expected messages, the last one of the assistant"):
        tool("measure_vision").read_questions(tmp_path / "questions.jsonl")


def test_the_prompts_are_those_of_training(tool, tmp_path):
    from qwen_jax.data import vision

    make, measure = tool("make_pictures"), tool("measure_vision")
    make.main(["--output", f"{tmp_path}", *"--pairs=1 --tasks=1 --dialogues=1 --texts=1 --held_out=3".split()])
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    tokenizer = Tokenizer(tmp_path / "bytes.tiktoken")
    path = tmp_path / "held_out/questions.jsonl"
    rows = [row for _, row in files.read_json_lines(path)]
    chat, pairs = vision.VisionChatRows(loss_on="report", num_queries=4), vision.VisionRows("pairs", 4)
    for row, one in zip(rows, measure.read_questions(path), strict=True):
        trained = chat.encode(row, tokenizer)
        first = int(np.flatnonzero(trained.loss_weights)[0])
        assert measure.prompt(tokenizer, one["kind"], one["asked"], 4, False) == trained.tokens[:first].tolist()
        if one["kind"] == "describe":
            trained = pairs.encode({"image": "a.png", "text": one["reference"]}, tokenizer)
            first = int(np.flatnonzero(trained.loss_weights)[0])
            assert measure.prompt(tokenizer, "describe", one["asked"], 4, True) == trained.tokens[:first].tolist()


def test_pictures_are_read_when_it_is_their_turn_and_a_damaged_one_is_named(tool, tmp_path):
    measure = tool("measure_vision")
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    pictures = [{"type": "image", "image": f"{name}.png"} for name in "abc"]
    rows = [
        {"messages": [{"role": "user", "content": [one]}, {"role": "assistant", "content": "x"}]} for one in pictures
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vision = VisionConfig(image_size=28, patch_size=14, num_queries=4)

    class Engine:
        tokenizer = Tokenizer(tmp_path / "bytes.tiktoken")
        model = types.SimpleNamespace(config=types.SimpleNamespace(vision=vision))
        asked = 0

        def generate(self, requests):
            for index, request in enumerate(requests):
                self.asked += 1
                assert request.images[0].shape == (28, 28, 3)
                yield types.SimpleNamespace(index=index, text="x")

    engine = Engine()
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        measure.ask(engine, measure.read_questions(tmp_path / "questions.jsonl"))
    assert engine.asked == 2
