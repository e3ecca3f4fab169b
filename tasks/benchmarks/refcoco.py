"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, Mao et al. 2016): the box that a phrase refers to.

Files of the publisher (lichengunc/refer): `refs(unc).p`, of RefCOCOg `refs(umd).p`, and `instances.json`, in a folder
of each set, and the pictures of COCO in `train2014/`. Every phrase is an example; validation and test splits are
subjects. Prompt as in eval_mm/evaluate_grounding.py: `<img>…</img><ref>phrase</ref><box>`, at most 28 tokens. A box
is right where it and the true one have an intersection of at least half their union. Two scores: `999` maps
coordinates back by 999, as that script does, `1000` by 1,000, as the released drawing code does. That script demands
10 tokens at least and drops the last incomplete batch: here an answer may be shorter, and counts as false, and no
example is dropped.
"""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_items
from qwen_jax.evaluation.vision.grounding import RELEASED_DRAWING, RELEASED_EVALUATION, iou, read_box, to_pixels
from qwen_jax.evaluation.vision.prompts import pictured
from tasks.data_dir import benchmark_files


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, objects of plain values, numbers and text, and refuses everything that could run code."""

    def find_class(self, module_name: str, global_name: str):
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, and may hold plain values only")


def plain_rows(file: Path) -> Iterator[Row]:
    """The objects of a pickled list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no pickle of a list of objects with plain values.
    """
    with files.open_file(file) as stream:
        try:
            # Written by Python 2: its texts are bytes.
            content = _PlainUnpickler(stream, encoding="latin-1").load()
        except Exception as error:  # damaged pickles raise many kinds
            raise ValueError(f"{file}: item 0: not a pickle of plain values: {error}: is the file cut?") from error
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise ValueError(f"{file}: item 0: expected a pickled list of objects, found {type(content).__name__}")
    for index, fields in enumerate(content):
        yield Row(f"{file}: item {index}", fields)


def reader(references: str, splits: tuple[str, ...]) -> Callable[[Path], Iterator[Example | LeftOut]]:
    """The reader of a set.

    Args:
        references: name of the pickled file.
        splits: those to read, all but `train`.
    """

    def read(folder: Path) -> Iterator[Example | LeftOut]:
        boxes = {row.get("id", int): row for row in json_items(folder / "instances.json", "annotations")}
        sizes = {row.get("id", int): row for row in json_items(folder / "instances.json", "images")}
        for row in plain_rows(folder / references):
            split = row.one_of("split", ("train", *splits))
            if split == "train":
                yield LeftOut(where=row.where, reason="a reference of the training split")
                continue
            annotation, image = boxes.get(row.get("ann_id", int)), sizes.get(row.get("image_id", int))
            if annotation is None or image is None:
                raise row.error(f"its annotation and its image in {folder / 'instances.json'}, found none")
            x, y, width, height = _numbers(annotation)
            for sentence in (Row(row.where, one) for one in row.get("sentences", list) if isinstance(one, dict)):
                phrase = sentence.text("sent")
                yield Example(
                    id=f"{row.get('ref_id', int)}/{sentence.get('sent_id', int)}",
                    subject=split,
                    target=[x, y, x + width, y + height],
                    extra={"width": image.get("width", int), "height": image.get("height", int)},
                    **pictured(folder / "train2014" / image.text("file_name"), {"type": "opening", "ref": phrase}),
                )

    return read


def _numbers(annotation: Row) -> list[float]:
    box = annotation.get("bbox", list)
    if len(box) != 4 or not all(isinstance(one, int | float) for one in box):
        raise annotation.error("four numbers in 'bbox'")
    return [float(one) for one in box]


def _extraction(units: int) -> Callable[[str, Example], Any]:
    def box(text: str, example: Example) -> list[float] | None:
        found = read_box(text)
        return None if found is None else list(to_pixels(found, example.extra["width"], example.extra["height"], units))

    return box


ANSWER = Generation(
    max_new_tokens=28,
    extract={str(units): _extraction(units) for units in (RELEASED_EVALUATION, RELEASED_DRAWING)},
    judge=lambda box, example: iou(box, example.target) >= 0.5,
    figures={"iou": lambda box, example: 0.0 if box is None else iou(box, example.target)},
)
for _name, _title, _file, _splits, _report, _size in (
    ("refcoco", "RefCOCO", "refs(unc).p", ("val", "testA", "testB"), {"Qwen-VL": 89.36, "Qwen-VL-Chat": 88.55}, 21586),
    (
        "refcoco_plus",
        "RefCOCO+",
        "refs(unc).p",
        ("val", "testA", "testB"),
        {"Qwen-VL": 83.12, "Qwen-VL-Chat": 82.82},
        21373,
    ),
    ("refcocog", "RefCOCOg", "refs(umd).p", ("val", "test"), {"Qwen-VL": 85.58, "Qwen-VL-Chat": 85.96}, 14498),
):
    add_benchmark(
        Benchmark(
            name=_name,
            title=f"{_title} (report: val)",
            folder=_name,
            files=f"{_file}, instances.json and train2014/*.jpg",
            shots=0,
            read=reader(_file, _splits),
            answers=ANSWER,
            table="Qwen-VL, Table 6",
            report=_report,
            source="lichengunc/refer; QwenLM/Qwen-VL eval_mm/evaluate_grounding.py",
            size=_size,
        ),
        benchmark_files,
    )
