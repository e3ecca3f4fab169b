"""Tasks with pictures: files to examples of tokens and encoded images, cached by SeqIO."""

import datetime
import io
import json
import logging
import tarfile

import gin
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import tensorflow as tf
from PIL import Image

import tasks  # noqa: F401  registers them
from qwen_jax import files
from qwen_jax.beam import short_errors
from qwen_jax.data import cache
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.token_cache import read_examples
from qwen_jax.data.tokenizer import Tokenizer
from tests.object_stores import Fault, FaultProxy, environment, s3, stores  # noqa: F401

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


def test_a_job_ends_where_too_much_is_left_out(tmp_path, tool, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(png())
    rows = [{"image": f"{name}.png", "text": name} for name in ("good", "none", "good", "good")]
    settings = {"pattern": write_rows(data, rows), "validation_share": 0.0, "unusable": "leave_out"}
    for name, value in settings.items():
        gin.bind_parameter(f"vision_pairs.{name}", value)
    where = dict(cache_dir=tmp_path, sequence_length=64, packing="whole", images_per_row=2, splits=("train",))
    message = r"1 of 4 documents of vision_pairs train are left out, 25.0% \(1: a picture that cannot be read\)"
    with pytest.raises(ValueError, match=message):
        cache.prepare("vision_pairs", **where)
    gin.bind_parameter("vision_pairs.max_left_out_share", 0.25)
    (prepared,) = cache.prepare("vision_pairs", **where)
    assert prepared.manifest.images == 3 and prepared.manifest.documents == 3


def test_dialogues_are_mixed_with_text(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    picture = {"type": "image", "image": "../a.png"}
    messages = [{"role": "user", "content": [picture]}, {"role": "assistant", "content": "red"}]
    for name, row in (("chat", {"messages": messages}), ("text", {"text": "some text"})):
        gin.bind_parameter(f"vision_{name}.pattern", write_rows(tmp_path / name, [row] * 4))
        gin.bind_parameter(f"vision_{name}.validation_share", 0.0)
    where = dict(cache_dir=tmp_path / "cache", sequence_length=128, packing="whole", images_per_row=2)
    prepared = cache.prepare("vision_chat_and_text", **where, splits=("train",))
    assert {one.manifest.task: one.manifest.images for one in prepared} == {"vision_chat": 4, "vision_text": 0}
    loader = ExampleLoader("vision_chat_and_text", **where, image_size=14)
    assert loader.rates == pytest.approx({"vision_chat": 0.8, "vision_text": 0.2})


def test_the_second_stage_mixes_pictures_and_text(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = {
        "pairs": {"text": "red"},
        "referring": {"ref": "it", "boxes": [[1, 2, 3, 4]]},
        "text": {"text": "some text"},
    }
    for kind, row in rows.items():
        pattern = write_rows(tmp_path / kind, [row | {"image": "../a.png"}] * 4)
        gin.bind_parameter(f"vision_{kind}.pattern", pattern)
        gin.bind_parameter(f"vision_{kind}.validation_share", 0.0)
    for name in ("vqa", "grounding", "grounded_captions", "ocr"):
        gin.bind_parameter(f"multitask_rates.{name}", 0)
    where = dict(cache_dir=tmp_path / "cache", sequence_length=64, packing="whole", images_per_row=2)
    prepared = cache.prepare("vision_multitask", **where, splits=("train",))
    assert {one.manifest.task: one.manifest.images for one in prepared} == {
        "vision_pairs": 4,
        "vision_referring": 4,
        "vision_text": 0,
    }
    loader = ExampleLoader("vision_multitask", **where, image_size=14)
    assert loader.rates == pytest.approx(
        {"vision_text": 0.2155, "vision_pairs": 0.5442, "vision_referring": 0.2403}, abs=1e-3
    )
    batch = loader.read(0, 12)
    shown = batch["images"].any(axis=(1, 2, 3, 4))
    tokenizer = Tokenizer(gin.query_parameter("vocabulary_path.path"))
    assert (shown == (batch["tokens"] == tokenizer.vision_tokens["<img>"]).any(axis=1)).all() and 0 < shown.sum() < 12


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
    features = json.loads((tmp_path / "info.train.json").read_text())["features"]
    path = next(tmp_path.glob("train.tfrecord-*"))
    with path.open("rb") as file:
        cached = list(read_examples(path, file, features))
    assert sorted(one["images"].tolist() for one in cached) == sorted(one["images"].tolist() for one in expected)
    assert sorted(one["targets"].tolist() for one in cached) == sorted(one["targets"].tolist() for one in expected)


def write_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def texts_of(found: list[dict], vocabulary_file) -> list[str]:
    tokenizer = Tokenizer(vocabulary_file)
    place = "<img>" + "<imgpad>" * PLACES + "</img>"
    return [tokenizer.decode(one["targets"]).replace(place, "▣") for one in found]


CAPTION = "▣Generate the caption in English: {}<|endoftext|>"


def test_shards_of_webdataset_hold_their_pictures(tmp_path, vocabulary_file):
    pictures = [png((number, 0, 0)) for number in range(4)]
    dialogue = {
        "images": ["0.png", "1.png"],
        "text": "two pictures",
    }
    shard = write_tar(
        tmp_path / "shard.tar",
        {
            "a/000.png": pictures[0],
            "a/000.txt": b"first\n",
            "a/001.json": json.dumps({"caption": "second", "url": "x"}).encode(),
            "a/001.png": pictures[1],
            "b/000.0.png": pictures[2],
            "b/000.1.png": pictures[3],
            "b/000.json": json.dumps(dialogue).encode(),
        },
    )
    found = examples("vision_pairs", shard, validation_share=0.0, fields={"caption": "text"})
    assert [one["images"].tolist() for one in found] == [[pictures[0]], [pictures[1]], pictures[2:]]
    expected = [CAPTION.format(text) for text in ("first", "second", "two pictures")]
    assert texts_of(found, vocabulary_file) == [*expected[:2], "▣" + expected[2]]
    assert [one["source"].decode() for one in found] == [f"{shard}: {key}" for key in ("a/000", "a/001", "b/000")]


def test_samples_of_a_shard_that_lack_something_are_counted(tmp_path, caplog):
    members = {
        "a.txt": b"x",
        "b.png": png(),
        "c.png": png(),
        "c.txt": b"x",
        "d.png": png(),
        "d.json": b"{",
        "a.png": png(),
    }
    shard = write_tar(tmp_path / "shard.tar", members)
    found = examples("vision_pairs", shard, validation_share=0.0, unusable="leave_out")
    assert [one["left_out"].decode() for one in found] == [
        "a sample without a picture",
        "a sample without text",
        "",
        "a sample whose json cannot be read",
        "a sample whose members do not stand together",
    ]
    assert f"{shard}: b: left out: a sample without text" in caplog.text


def test_what_is_held_out_does_not_depend_on_where_a_shard_lies(tmp_path):
    members = {}
    for number in range(20):
        members |= {f"{number}.png": png((number, 0, 0)), f"{number}.txt": b"x"}
    held_out = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        shard = write_tar(tmp_path / folder / "shard.tar", members)
        found = examples("vision_pairs", shard, "validation", validation_share=0.4)
        held_out.append([one["images"][0] for one in found])
    assert held_out[0] == held_out[1] and 0 < len(held_out[0]) < 20


def test_pictures_are_read_from_a_bucket_as_from_a_disk(s3, tmp_path):  # noqa: F811
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((1, 0, 0)))
    rows = [{"image": f"pictures/{name}.png", "text": name} for name in ("a", "none", "../a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tar(tmp_path / "shard.tar", {"1.png": png((2, 0, 0)), "1.txt": b"two"})
    pq.write_table(pa.table({"image": [png((3, 0, 0))], "text": ["three"]}), tmp_path / "table.parquet")
    url = files.as_path(s3.folder())
    for path in tmp_path.rglob("*.*"):
        files.copy_file(path, url / path.relative_to(tmp_path).as_posix())
    settings = {"validation_share": 0.0, "unusable": "leave_out"}
    local, remote = (examples("vision_pairs", str(folder), **settings) for folder in (tmp_path, url))
    assert [one["left_out"] for one in remote] == [b"", *[b"a picture that cannot be read"] * 2, b"", b""]
    for one, other in zip(remote, local, strict=True):
        assert one["source"].decode().replace(str(url), str(tmp_path)) == other["source"].decode()
        assert all(np.array_equal(one[name], other[name]) for name in one if name != "source")
    with FaultProxy(s3) as proxy, environment(s3.through(proxy) | {"QWEN_JAX_STORE_RETRY_SECONDS": "2"}):
        proxy.faults = [Fault(r"GET .*a\.png$", "403", count=10_000)]
        with pytest.raises(OSError, match=r"pictures/a\.png: no permission"):  # and not a picture less
            examples("vision_pairs", str(url / "rows.jsonl"), **settings)


def test_dots_in_the_names_of_a_shard_do_not_merge_samples(tmp_path):
    members = {"IMG.2024.png": png(), "IMG.2024.txt": b"one", "IMG.2025.png": png(), "IMG.2025.txt": b"two"}
    with pytest.raises(
        ValueError, match="the key of a sample ends at the first dot of a name, so IMG has a picture 2024"
    ):
        examples("vision_pairs", write_tar(tmp_path / "shard.tar", members | {"IMG.txt": b"x"}), validation_share=0.0)
    with pytest.raises(ValueError, match="shard.tar: not a readable tar file past sample None"):
        (tmp_path / "shard.tar").write_bytes(b"no tar" * 200)
        examples("vision_pairs", str(tmp_path / "shard.tar"), validation_share=0.0)


def test_parquet_holds_pictures_as_bytes_or_as_structs(tmp_path, vocabulary_file):
    pictures = [png((number, 0, 0)) for number in range(4)]
    (tmp_path / "beside.png").write_bytes(pictures[3])
    structs = [{"bytes": pictures[0], "path": "x.png"}, {"bytes": None, "path": "beside.png"}]
    several = [[{"bytes": data, "path": None} for data in pictures[1:3]]] * 2
    table = pa.table({"image": structs, "text": ["first", "second"]})
    pq.write_table(table, tmp_path / "one.parquet")
    pq.write_table(pa.table({"images": several, "question": ["q"] * 2, "answer": ["a"] * 2}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"picture": [pictures[0]], "alt": ["third"]}), tmp_path / "three.parquet")
    found = examples("vision_pairs", str(tmp_path / "one.parquet"), validation_share=0.0)
    assert [one["images"].tolist() for one in found] == [[pictures[0]], [pictures[3]]]
    found = examples("vision_vqa", str(tmp_path / "two.parquet"), validation_share=0.0)
    assert [one["images"].tolist() for one in found] == [pictures[1:3]] * 2
    fields = {"picture": "image", "alt": "text"}
    found = examples("vision_pairs", str(tmp_path / "three.parquet"), validation_share=0.0, fields=fields)
    assert texts_of(found, vocabulary_file) == [CAPTION.format("third")] and found[0]["images"].tolist() == pictures[:1]


def test_a_tfds_dataset_on_disk_gives_a_row_for_each_caption(tmp_path, vocabulary_file):
    import tensorflow_datasets as tfds

    kinds = tfds.features
    features = kinds.FeaturesDict({"image": kinds.Image(), "captions": kinds.Sequence({"text": kinds.Text()})})
    pictures = [np.full((6, 8, 3), number, np.uint8) for number in range(2)]
    rows = [{"image": one, "captions": [{"text": f"{number} a"}, {"text": "b"}]} for number, one in enumerate(pictures)]
    encoded = [features.serialize_example(features.encode_example(row)) for row in rows]
    folder = tmp_path / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(folder / "pairs-train.tfrecord-00000-of-00001")) as writer:
        for one in encoded:
            writer.write(one)
    size = sum(map(len, encoded))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[2],
        num_bytes=size,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="pairs", filetype_suffix="tfrecord"
        ),
    )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=[split])
    found = examples("vision_pairs", str(folder), validation_share=0.0, fields={"captions/text": "text"})
    assert texts_of(found, vocabulary_file) == [CAPTION.format(text) for text in ("0 a", "b", "1 a", "b")]
    for number, one in enumerate(found):
        (data,) = one["images"]
        assert (np.asarray(Image.open(io.BytesIO(data))) == number // 2).all()


def test_the_tool_shows_pictures_and_loss(tmp_path, tool, capsys, vocabulary_file):
    (tmp_path / "a.png").write_bytes(png())
    pattern = write_rows(tmp_path, [{"image": "a.png", "ref": "it", "boxes": [[1, 2, 3, 4]]}] * 2)
    arguments = [f"--gin.vision_referring.pattern={pattern}", f"--gin.vocabulary_path.path={vocabulary_file}"]
    arguments += [f"--gin.picture_places.num_queries={PLACES}", "--gin.vision_referring.validation_share=0"]
    tool("inspect_task").main(["vision_referring", *arguments])
    shown = capsys.readouterr().out
    assert "⟪<img>⟫⟪<imgpad>×4⟫⟪</img>⟫⟪<ref>⟫it⟪</ref>⟫⟦⟪<box>⟫(1,2),(3,4)⟪</box>⟫⟪<|endoftext|>⟫⟧" in shown
    assert "pictures:               2, 1.00 per document" in shown


def test_rows_of_a_picture_that_a_file_holds_are_held_out_together(tmp_path):
    rows = [(png((number, 0, 0)), f"q{k}") for number in range(20) for k in range(2)]
    table = pa.table({"image": [one for one, _ in rows], "question": [one for _, one in rows], "answer": ["a"] * 40})
    pq.write_table(table, tmp_path / "rows.parquet")
    train, held_out = (
        examples("vision_vqa", str(tmp_path / "rows.parquet"), split, validation_share=0.3)
        for split in ("train", "validation")
    )
    images = [{one["images"][0] for one in split} for split in (train, held_out)]
    assert len(train) + len(held_out) == 40 and all(images) and not images[0] & images[1]


def test_a_row_with_several_pictures_stays_one_row_under_other_names(tmp_path):
    pictures = [png((number, 0, 0)) for number in range(2)]
    pq.write_table(pa.table({"shown": [pictures], "said": ["two pictures"]}), tmp_path / "rows.parquet")
    fields = {"shown": "images", "said": "text"}
    (found,) = examples("vision_pairs", str(tmp_path / "rows.parquet"), validation_share=0.0, fields=fields)
    assert found["images"].tolist() == pictures


def test_only_one_field_makes_several_rows(tmp_path):
    rows = [{"image": "a.png", "ask": ["q", "r"], "say": ["a", "b"]}]
    (tmp_path / "a.png").write_bytes(png())
    fields = {"ask": "question", "say": "answer"}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: lists of texts in answer and question: .* one of them"):
        examples("vision_vqa", write_rows(tmp_path, rows), validation_share=0.0, fields=fields)


def test_other_columns_of_parquet_may_be_anything(tmp_path):
    """A row without a picture is held out by all of its fields."""
    day = datetime.date(2023, 9, 28)
    pq.write_table(pa.table({"text": ["one", "two"], "date": [day] * 2}), tmp_path / "rows.parquet")
    found = examples("vision_text", str(tmp_path / "rows.parquet"), validation_share=0.0)
    assert [one["left_out"] for one in found] == [b"", b""]


def test_a_field_that_is_null_is_left_out_as_other_rows(tmp_path):
    """Parquet has nulls where a download failed, or a picture has no caption."""
    table = pa.table({"image": [png(), None, png()], "text": ["one", "two", None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = examples("vision_pairs", str(tmp_path / "rows.parquet"), validation_share=0.0, unusable="leave_out")
    assert [one["left_out"].decode() for one in found] == ["", "a field that is null", "a field that is null"]


@pytest.mark.parametrize(("task", "layout"), [("referring", "refcoco"), ("chat", "llava"), ("chat", "messages")])
def test_a_line_that_is_no_object_is_named(tmp_path, task, layout):
    (tmp_path / "rows.jsonl").write_text('["a.png", "a caption"]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: expected an object.*, found list"):
        examples(f"vision_{task}", str(tmp_path / "rows.jsonl"), validation_share=0.0, layout=layout)


def test_a_dialogue_that_is_null_is_left_out(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [said, None]}), tmp_path / "rows.parquet")
    found = examples("vision_chat", str(tmp_path / "rows.parquet"), validation_share=0.0, unusable="leave_out")
    assert [one["left_out"].decode() for one in found] == ["", "empty conversation"]
