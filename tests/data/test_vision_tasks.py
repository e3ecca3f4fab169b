"""Tasks with pictures: files to examples of tokens and encoded images, cached by SeqIO."""

import io
import json
import logging

import gin
import numpy as np
import pytest
import seqio
from PIL import Image

import tasks  # noqa: F401  registers them
from qwen_jax.beam import short_errors
from qwen_jax.data.tokenizer import Tokenizer

PLACES = 4


@pytest.fixture(autouse=True)
def configure(vocabulary_file):
    gin.clear_config()
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    gin.bind_parameter("picture_places.num_queries", PLACES)
    yield
    gin.clear_config()


def png(color: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def write_rows(folder, rows: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def examples(task: str, pattern, split: str = "train", **settings) -> list[dict]:
    for name, value in ({"pattern": pattern} | settings).items():
        gin.bind_parameter(f"{task}.{name}", value)
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False, use_cached=False)
    with short_errors():
        return list(dataset.as_numpy_iterator())


def test_pairs_carry_the_files_of_their_pictures(tmp_path, vocabulary_file):
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.png").write_bytes(png((ord(name), 0, 0)))
    rows = [{"image": f"pictures/{name}.png", "text": f"the {name}"} for name in "ab"]
    write_rows(tmp_path, rows)
    found = examples("vision_pairs", str(tmp_path), validation_share=0.0)
    tokenizer = Tokenizer(vocabulary_file)
    assert [one["images"].tolist() for one in found] == [[png((ord(name), 0, 0))] for name in "ab"]
    for name, one in zip("ab", found, strict=True):
        assert one["targets"].dtype == one["loss_weights"].dtype == np.int32
        place = "<img>" + "<imgpad>" * PLACES + "</img>"
        assert tokenizer.decode(one["targets"]) == f"{place}Generate the caption in English: the {name}<|endoftext|>"
        learned = one["targets"][one["loss_weights"] == 1]
        assert tokenizer.decode(learned) == f" the {name}<|endoftext|>" and one["left_out"] == b""


def test_all_rows_of_a_picture_are_held_out_or_none(tmp_path):
    (tmp_path / "same.png").write_bytes(png())
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png((number, 0, 0)))
    rows = [{"image": f"{number}.png", "question": f"q{k}", "answer": "a"} for number in range(20) for k in range(2)]
    pattern = write_rows(tmp_path, rows)
    train = examples("vision_vqa", pattern, validation_share=0.3)
    held_out = examples("vision_vqa", pattern, "validation", validation_share=0.3)
    images = [{one["images"][0] for one in split} for split in (train, held_out)]
    assert len(train) + len(held_out) == 40 and all(images) and not images[0] & images[1]


def test_rows_whose_picture_is_bad_are_named_and_counted(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:40])
    (tmp_path / "large.png").write_bytes(png(size=(40, 30)))
    rows = [{"image": f"{name}.png", "text": name} for name in ("good", "cut", "none", "large", "good")]
    pattern = write_rows(tmp_path, rows)
    limits = {"validation_share": 0.0, "max_pixels": 1000}
    with caplog.at_level(logging.WARNING):
        found = examples("vision_pairs", pattern, unusable="leave_out", **limits)
    reasons = ["", "a damaged picture", "a picture that cannot be read", "a picture with too many pixels", ""]
    assert [one["left_out"].decode() for one in found] == reasons
    assert [len(one["images"]) for one in found] == [len(one["targets"]) > 0 for one in found] == [1, 0, 0, 0, 1]
    assert f"{pattern}:2: left out: a damaged picture (cut.png cannot be read as an image" in caplog.text
    assert f"{pattern}:3: left out: a picture that cannot be read ({tmp_path}/none.png: No such file" in caplog.text
    assert "large.png has 40 x 30 pixels, more than 1,000" in caplog.text
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a damaged picture .* vision_pairs.unusable = 'leave_out'"):
        examples("vision_pairs", pattern, unusable="stop", **limits)


def test_dialogues_may_have_several_pictures_or_none(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png((ord(name), 0, 0)))
    both = [{"type": "image", "image": f"{name}.png"} for name in "ba"]
    answer = {"role": "assistant", "content": "x"}
    rows = [{"messages": [{"role": "user", "content": asked}, answer]} for asked in (both, "text")]
    found = examples("vision_chat", write_rows(tmp_path, rows), validation_share=0.0)
    assert found[0]["images"].tolist() == [png((98, 0, 0)), png((97, 0, 0))]
    assert found[1]["images"].tolist() == []


def test_seqio_caches_the_encoded_pictures(tmp_path, tool, vocabulary_file):
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number in range(6):
        (data / f"{number}.png").write_bytes(png((number, 0, 0)))
        rows.append({"image": f"{number}.png", "text": f"text {number}"})
    expected = examples("vision_pairs", write_rows(data, rows), validation_share=0.0)
    from seqio import beam_utils

    from qwen_jax.beam import open_pipeline

    task = seqio.TaskRegistry.get("vision_pairs")
    with open_pipeline(()) as pipeline:
        made = pipeline | beam_utils.PreprocessTask(task, "train")
        prefix = seqio.get_cached_tfrecord_prefix(str(tmp_path), "train")
        _ = made | "write" >> beam_utils.WriteExampleTfRecord(prefix, num_shards=1)
        _ = made | "info" >> beam_utils.GetInfo(1) | beam_utils.WriteJson(str(tmp_path / "info.train.json"))
    from qwen_jax.data.pack_cache import _read_cache

    file = str(next(tmp_path.glob("train.tfrecord-*")))
    cached = list(_read_cache(tmp_path, "train", file).as_numpy_iterator())
    assert sorted(one["images"].tolist() for one in cached) == sorted(one["images"].tolist() for one in expected)
    assert sorted(one["targets"].tolist() for one in cached) == sorted(one["targets"].tolist() for one in expected)


def test_the_tool_shows_pictures_and_loss(tmp_path, tool, capsys, vocabulary_file):
    (tmp_path / "a.png").write_bytes(png())
    pattern = write_rows(tmp_path, [{"image": "a.png", "ref": "it", "boxes": [[1, 2, 3, 4]]}] * 2)
    arguments = [f"--gin.vision_referring.pattern={pattern}", f"--gin.vocabulary_path.path={vocabulary_file}"]
    arguments += [f"--gin.picture_places.num_queries={PLACES}", "--gin.vision_referring.validation_share=0"]
    tool("inspect_task").main(["vision_referring", *arguments])
    shown = capsys.readouterr().out
    assert "⟪<img>⟫⟪<imgpad>×4⟫⟪</img>⟫⟪<ref>⟫it⟪</ref>⟫⟦⟪<box>⟫(1,2),(3,4)⟪</box>⟫⟪<|endoftext|>⟫⟧" in shown
    assert "pictures:               2, 1.00 per document" in shown
