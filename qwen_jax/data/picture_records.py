"""Files of rows with pictures, as SeqIO examples of tokens and encoded images.

Pictures are read when a row becomes an example and kept as they are encoded in their files: decoded, a picture of 448
pixels takes 0.6 MB. Each is decoded once here, so that no training meets one that cannot be.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.data.chat import Encoded
from qwen_jax.data.content import Unusable
from qwen_jax.data.images import MAX_PIXELS, UnusableImageError, open_image
from qwen_jax.data.quick_seqio import tf
from qwen_jax.data.records import Records, record_files
from qwen_jax.data.tokenizer import Tokenizer

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureRecords(Records):
    """Files of rows with pictures.

    Attributes:
        max_pixels: largest width times height of a picture.
        max_pictures: most pictures of a row.
    """

    max_pixels: int = MAX_PIXELS
    max_pictures: int = 64

    def examples(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(group, example) of the rows of one file.

        An example has the row as JSON in `text`, its place in `source`, the folder of relative paths in `folder`, and
        `names` and `images`, the pictures that the file itself holds.
        """
        for where, row in files.read_json_rows(path):
            group = self.rows.group(row) if isinstance(row, Mapping) else ""
            text = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
            yield group, {"text": text, "source": where, "folder": str(path.parent), "names": [], "images": []}

    def signature(self) -> dict[str, tf.TensorSpec]:
        """Types of what `examples` gives."""
        lists = {name: tf.TensorSpec([None], tf.string) for name in ("names", "images")}
        return super().signature() | {"folder": tf.TensorSpec([], tf.string)} | lists

    def settings(self) -> dict:
        """As of `Records`, with the limits of pictures."""
        return super().settings() | {"max_pixels": self.max_pixels, "max_pictures": self.max_pictures}

    def encode_row(self, example: Mapping[str, Any], tokenizer: Tokenizer) -> Encoded:
        """The example of a row, whose `images` are bytes.

        Raises:
            Unusable: a picture that is missing, damaged, or too large; or as the rows.
            ValueError: as the rows.
        """
        encoded = super().encode_row(example, tokenizer)
        if len(encoded.images) > self.max_pictures:
            raise Unusable(f"more than {self.max_pictures} pictures", f"{len(encoded.images)}")
        held = {name.decode(): image for name, image in zip(example["names"], example["images"], strict=True)}
        folder = Path(os.fsdecode(example["folder"]))
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
            raise Unusable("a picture that cannot be read", f"{folder / name}: {_detail(error)}") from error
        return data


def _detail(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def picture_files(pattern: files.Pattern | Sequence[files.Pattern] | None, task: str) -> list[Path]:
    """Files of a task that `pattern` names; see `records.record_files`. Pictures may lie beside them."""
    return record_files(pattern, task, beside=PICTURE_SUFFIXES)
