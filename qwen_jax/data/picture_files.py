"""Readers of rows with pictures: JSON lines beside image files, tar shards, Parquet, and datasets of TFDS on disk.

| files | a row |
|---|---|
| `.jsonl`, `.json` (also compressed) | an object that names image files by paths relative to the file's folder |
| `.tar` (webdataset) | the members `KEY.json` or `KEY.txt` and `KEY.jpg`, side by side |
| `.parquet` | a row, with images as bytes, or as Hugging Face's structs of `bytes` and `path` |
| `NAME-SPLIT.tfrecord-…` of a TFDS dataset | an example; nested features are named `captions/text` |

A sample that cannot become a row carries the reason, so that it is counted like other rows that cannot be trained on.
"""

import contextlib
import dataclasses
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwen_jax import files
from qwen_jax.data.quick_seqio import tf

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TFRECORD = re.compile(r"-(?P<split>[^-]+)\.tfrecord-\d{5}-of-\d{5}$")
# Fields by which rows of any task name their pictures.
_NAMING = ("image", "images", "messages", "conversations", "content")
# Rows of Parquet that are in memory at a time.
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        where: file and row, for messages.
        row: its fields.
        images: the pictures that the file itself holds, by the names that the row has for them.
        damage: reason for which it is no row; "" as a rule.
    """

    where: str
    row: Any
    images: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    damage: str = ""


def is_tfds(path: Path) -> bool:
    """Whether a file is of a TFDS dataset."""
    return bool(_TFRECORD.search(path.name))


def tfds_files(folder: Path, split: str = "train") -> list[Path]:
    """Files of a split of the TFDS dataset in `folder`, such as `…/coco_captions/2014/1.1.0`; none elsewhere."""
    if not (folder / "dataset_info.json").is_file():
        return []
    found = ((path, _TFRECORD.search(path.name)) for path in sorted(folder.iterdir()))
    return [path for path, match in found if match and match["split"] == split]


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of one file, in its order.

    Raises:
        ValueError: the file is damaged; the message names it.
        OSError: it is missing, or its bucket gives no answer.
    """
    if is_tfds(path):
        yield from _tfds(path)
    elif path.suffix.lower() == ".tar":
        yield from _tar(path)
    elif path.suffix.lower() == ".parquet":
        yield from _parquet(path)
    else:
        for where, row in files.read_json_rows(path):
            yield Sample(where, row)


def _tar(path: Path) -> Iterator[Sample]:
    """Samples of a tar in webdataset's layout: members of one key follow each other.

    The key ends at the first dot of the base name, as webdataset has it. So `IMG.2024.jpg` would be a picture
    `2024.jpg` of the sample `IMG`: such a picture is taken only where the JSON of its sample names it.
    """
    key, members, seen = None, {}, set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if folder + slash + stem != key:
                    if members:
                        yield _sample(path, str(key), members, seen)
                    key, members = folder + slash + stem, {}
                content = archive.extractfile(member)
                assert content is not None  # of a regular file
                members[ending] = content.read()
            if members:
                yield _sample(path, str(key), members, seen)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _kind(path, error)(f"{path}: not a readable tar file past sample {key}: {error}") from error


def _sample(path: Path, key: str, members: Mapping[str, bytes], seen: set[str]) -> Sample:
    where = f"{path}: {key}"
    if key in seen:
        return Sample(where, {}, damage="a sample whose members do not stand together")
    seen.add(key)
    row, damage = {}, ""
    for ending in ("json", "txt"):
        if ending in members:
            try:
                text = members[ending].decode("utf-8-sig")
                row |= json.loads(text) if ending == "json" else {"text": text.strip()}
            except (ValueError, TypeError):
                return Sample(where, {}, damage=f"a sample whose {ending} cannot be read")
    images = {ending: data for ending, data in members.items() if f".{ending.lower()}".endswith(PICTURE_SUFFIXES)}
    if not images:
        damage = "a sample without a picture"
    elif not row:
        damage = "a sample without text"
    elif not any(field in row for field in _NAMING):
        dotted = [ending for ending in images if "." in ending]
        if dotted or len(images) > 1:
            first, others = sorted(images)[0], "" if dotted else f" beside {sorted(images)[1]}"
            raise ValueError(
                f"{path}: the key of a sample ends at the first dot of a name, so {key} has a picture {first}{others}: "
                "take dots out of the names of files, or name the pictures of a sample in its JSON, in 'images'"
            )
        row["image"] = next(iter(images))
    return Sample(where, row, images, damage)


def _parquet(path: Path) -> Iterator[Sample]:
    number = 0
    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    images: dict[str, bytes] = {}
                    fields = {name: _without_bytes(value, name, images) for name, value in row.items()}
                    yield Sample(f"{path}: row {number}", fields, images)
                    number += 1
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        detail = " ".join(str(error).split())
        raise _kind(path, error)(f"{path}: not a readable Parquet file past row {number}: {detail}") from error


def _kind(path: Path, error: Exception) -> type[OSError] | type[ValueError]:
    """ValueError for a damaged file; what a bucket refuses says nothing about the file."""
    return OSError if files.is_remote(path) and isinstance(error, OSError) else ValueError


def _without_bytes(value: Any, name: str, images: dict[str, bytes]) -> Any:
    """A value in which names stand for bytes, which go to `images`."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        images[name] = value
        return name
    if isinstance(value, dict):
        return {key: _without_bytes(one, f"{name}/{key}", images) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_bytes(one, f"{name}/{number}", images) for number, one in enumerate(value)]
    return value


def _tfds(path: Path) -> Iterator[Sample]:
    # Here, because it takes seconds to import.
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(path.parent).info.features
    encoded = {name: tfds.decode.SkipDecoding() for name in _images_of(features, tfds)}
    try:
        for number, record in enumerate(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()):
            example = features.deserialize_example_np(record, decoders=_nested(encoded))
            images: dict[str, bytes] = {}
            fields = {}
            for name, value in _flat(example):
                plain = _plain(value)
                if name in encoded:
                    images[name] = plain
                    fields[name] = name
                else:
                    fields[name] = _text_of(plain)
            yield Sample(f"{path}: example {number}", fields, images)
    except tf.errors.DataLossError as error:
        raise ValueError(f"{path} is damaged: {error.message}") from error


def _images_of(features: Any, tfds: Any, prefix: str = "") -> list[str]:
    found = []
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            found += _images_of(feature, tfds, f"{prefix}{name}/")
        elif isinstance(feature, tfds.features.Image):
            found.append(prefix + name)
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return result


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _flat(one, f"{prefix}{name}/")
        else:
            yield prefix + name, one


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _text_of(value: Any) -> Any:
    if isinstance(value, list):
        return [_text_of(one) for one in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return ""
    return value
