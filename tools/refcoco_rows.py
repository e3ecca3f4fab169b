"""Writes the training phrases of RefCOCO, RefCOCO+ or RefCOCOg as rows to train on.

    python tools/refcoco_rows.py --references 'refcoco/refs(unc).p' --instances refcoco/instances.json \\
        --output refcoco/train.jsonl
    python -m qwen_jax.train … --gin.vision_referring.pattern=refcoco/train.jsonl --gin.vision_referring.layout=refcoco

The files are the publisher's (lichengunc/refer). A row is a phrase: `{"image": "train2014/COCO_….jpg", "ref": "the
cat", "bbox": [x, y, width, height], "width": 640, "height": 480}`, in pixels, for `vision_referring` and
`vision_grounded_captions`. Paths are relative to the folder of --output; --pictures names another folder. References of
the other splits, which `python -m qwen_jax.evaluate` asks, are left out and counted.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.evaluation.rows import Row, json_items


def rows(references: Path, instances: Path, pictures: str, split: str) -> Iterator[dict | None]:
    """A row for each phrase of a split; None for a reference of another one.

    Raises:
      OSError: a file is missing.
      ValueError: a file is damaged, or a reference has no annotation; the message names it.
    """
    from tasks.benchmarks.refcoco import plain_rows

    boxes = {row.get("id", int): row for row in json_items(instances, "annotations")}
    sizes = {row.get("id", int): row for row in json_items(instances, "images")}
    for reference in plain_rows(references):
        if reference.text("split") != split:
            yield None
            continue
        box, image = boxes.get(reference.get("ann_id", int)), sizes.get(reference.get("image_id", int))
        if box is None or image is None:
            raise reference.error(f"its annotation and its image in {instances}, found none")
        shared = {
            "image": f"{pictures}/{image.text('file_name')}",
            "bbox": box.get("bbox", list),
            "width": image.get("width", int),
            "height": image.get("height", int),
        }
        for one in reference.get("sentences", list):
            yield {**shared, "ref": Row(reference.where, one).text("sent")}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("references", "refs(unc).p or refs(umd).p"), ("instances", "instances.json beside it")):
        parser.add_argument(f"--{name}", type=path_argument, required=True, metavar="FILE", help=what)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--pictures", default="train2014", help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    asked = parser.parse_args(argv)
    written = others = 0
    with files.new_file(asked.output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows(asked.references, asked.instances, asked.pictures, asked.split):
            if row is None:
                others += 1
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise ValueError(f"{asked.references}: no reference of split {asked.split!r} among {others:,}")
    print(f"{asked.output}: {written:,} rows; {others:,} references of other splits left out")


if __name__ == "__main__":
    run(main)
