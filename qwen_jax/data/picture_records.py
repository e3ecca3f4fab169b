"""Files of rows with pictures, as SeqIO examples of tokens and encoded images.

Pictures are read when a row becomes an example and kept as they are encoded in their files: decoded, a picture of 448
pixels takes 0.6 MB. Each is decoded once here, so that no training meets one that cannot be.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.data.chat import Encoded
from qwen_jax.data.content import Unusable
from qwen_jax.data.images import MAX_PIXELS, UnusableImageError, open_image
from qwen_jax.data.picture_files import PICTURE_SUFFIXES, Sample, is_tfds, read_samples, tfds_files
from qwen_jax.data.records import SUFFIXES as ROW_SUFFIXES
from qwen_jax.data.records import Records, record_files
from qwen_jax.data.tokenizer import Tokenizer

SUFFIXES = (*ROW_SUFFIXES, ".tar", ".parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRecords(Records):
    """Files of rows with pictures.

    Attributes:
        max_pixels: largest width times height of a picture.
        max_pictures: most pictures of a row.
        fields: (field of the file, field of the row) of fields that have another name in the file. A text that is a
            list there, such as five captions of a picture, makes as many rows.
    """

    max_pixels: int = MAX_PIXELS
    max_pictures: int = 64
    fields: tuple[tuple[str, str], ...] = ()

    def examples(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(group, example) of the rows of one file.

        An example has the row as JSON in `text`, its place in `source`, the folder of relative paths in `folder`,
        `names` and `images`, the pictures that the file itself holds, and `damage`, see `picture_files.Sample`.
        """
        for sample in read_samples(path):
            folder, names, images = str(path.parent), list(sample.images), list(sample.images.values())
            # Not by the whole path: a data set that moves holds out the same rows.
            place = path.name + sample.where.removeprefix(str(path))
            for where, row in self._rows(sample):
                group = self.rows.group(row) if isinstance(row, Mapping) else ""
                if group in sample.images:
                    # Such pictures have short names, such as `jpg`, in each sample, and may be in several.
                    group = hashlib.sha256(sample.images[group]).hexdigest()
                elif names:
                    group = f"{place}: {group}"
                text = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                texts = {"text": text, "source": where, "folder": folder, "damage": sample.damage}
                yield group, texts | {"names": names, "images": images}

    def _rows(self, sample: Sample) -> Iterator[tuple[str, Any]]:
        if not self.fields or not isinstance(sample.row, Mapping):
            yield sample.where, sample.row
            return
        renamed = dict(self.fields)
        row = {renamed.get(name, name): value for name, value in sample.row.items()}
        # Names of pictures are no texts.
        several = sorted(name for name in {*renamed.values()} - {"image", "images"} if _are_texts(row.get(name)))
        if len(several) > 1:
            raise ValueError(
                f"{sample.where}: lists of texts in {' and '.join(several)}: rows can be made of the texts of "
                f"one of them alone, see {self.task}.fields"
            )
        if not several:
            yield sample.where, row
        for name in several:
            for number, text in enumerate(row[name]):
                yield f"{sample.where}, text {number}", row | {name: text}

    def features(self) -> dict[str, bool]:
        """As of a corpus."""
        return super().features() | {"folder": False, "damage": False, "names": True, "images": True}

    def settings(self) -> dict:
        """As of `Records`, with the limits of pictures and the names of fields."""
        limits = {"max_pixels": self.max_pixels, "max_pictures": self.max_pictures}
        return super().settings() | limits | {"fields": dict(self.fields)}

    def encode_row(self, example: Mapping[str, Any], tokenizer: Tokenizer) -> Encoded:
        """The example of a row, whose `images` are bytes.

        Raises:
            Unusable: a picture that is missing, damaged, or too large; or as the rows.
            OSError: a bucket gives no answer.
            ValueError: as the rows.
        """
        if example["damage"]:
            raise Unusable(example["damage"].decode())
        encoded = super().encode_row(example, tokenizer)
        if len(encoded.images) > self.max_pictures:
            raise Unusable(f"more than {self.max_pictures} pictures", f"{len(encoded.images)}")
        held = {name.decode(): image for name, image in zip(example["names"], example["images"], strict=True)}
        text = os.fsdecode(example["folder"])
        folder = files.as_path(text) if files.is_remote(text) else Path(text)
        found: dict[str | bytes, bytes] = {}
        for name in encoded.images:
            if name not in found:
                found[name] = self._read(name, held, folder)
        return dataclasses.replace(encoded, images=tuple(found[name] for name in encoded.images))

    def _read(self, name: str | bytes, held: Mapping[str, bytes], folder: Path) -> bytes:
        assert isinstance(name, str)  # rows of files name their pictures
        try:
            data = held[name] if name in held else (folder / name).read_bytes()
            open_image(data, name=name, max_pixels=self.max_pixels)
        except UnusableImageError as error:
            raise Unusable(error.reason, str(error)) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            of_bucket = files.is_remote(folder) and name not in held and isinstance(error, OSError)
            if of_bucket and not isinstance(error, FileNotFoundError):
                raise  # a bucket that gives no answer is no picture less
            raise Unusable("a picture that cannot be read", f"{folder}/{name}: {_detail(error)}") from error
        return data


def _detail(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def picture_files(pattern: files.Pattern | Sequence[files.Pattern] | None, task: str) -> list[Path]:
    """Files of a task that `pattern` names; see `records.record_files`. Pictures may lie beside them.

    The folder of a TFDS dataset stands for the files of its training split.

    Raises:
        ValueError, FileNotFoundError: as `records.record_files`; or a TFDS dataset is in a bucket.
    """
    given = [pattern] if isinstance(pattern, str | os.PathLike | files.RemotePath) else list(pattern or [])
    found: set[Path] = set()
    others: list[files.Pattern] = []
    for one in given:
        path = files.as_path(one, f"{task}.pattern")
        of_tfds = tfds_files(path) or [path for path in map(Path, glob.glob(str(path))) if is_tfds(path)]
        if of_tfds and files.is_remote(path):
            raise ValueError(f"{task}.pattern: {path} is a dataset of TFDS in a bucket: copy it to a local disk")
        found.update(of_tfds)
        others += [] if of_tfds else [one]
    if others or not given:
        found.update(record_files(others, task, SUFFIXES, beside=PICTURE_SUFFIXES))
    return sorted(found, key=lambda path: (files.is_remote(path), path))
