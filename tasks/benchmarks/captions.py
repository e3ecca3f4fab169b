"""Captions of photographs, scored by CIDEr: NoCaps, Flickr30k, and COCO.

Files of the publishers: `nocaps_val_4500_captions.json` and `captions_val2014.json` (COCO's layout: images and
annotations), `dataset_flickr30k.json` (Karpathy's splits, of which the test split is read). Prompt and limit of 30
tokens as in eval_mm/evaluate_caption.py. The score is 100 times CIDEr over all pictures that were read
(`qwen_jax.evaluation.vision.captions`); it needs the whole set, since all references decide the weights of words.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut, Outcome
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_items
from qwen_jax.evaluation.vision.captions import cider, words
from qwen_jax.evaluation.vision.prompts import pictured
from tasks.data_dir import benchmark_files

PROMPT = "Describe the image in English:"


def from_coco(file: Path, pictures: Path) -> Iterator[Example | LeftOut]:
    """The pictures of a file in COCO's layout."""
    captions = collections.defaultdict(list)
    for row in json_items(file, "annotations"):
        captions[row.get("image_id", int)].append(row.text("caption"))
    for row in json_items(file, "images"):
        number = row.get("id", int)
        if number not in captions:
            yield LeftOut(where=row.where, reason="a picture without a caption")
            continue
        yield Example(id=str(number), target=captions[number], **pictured(pictures / row.text("file_name"), PROMPT))


def from_karpathy(file: Path, pictures: Path) -> Iterator[Example | LeftOut]:
    """The test split of a file in Karpathy's layout."""
    for row in json_items(file, "images"):
        if row.text("split") != "test":
            yield LeftOut(where=row.where, reason="a picture of another split")
            continue
        captions = [Row(row.where, one).text("raw") for one in row.get("sentences", list) if isinstance(one, dict)]
        if not captions:
            raise row.error("at least one caption in 'sentences', found none")
        name = row.text("filename")
        yield Example(id=name, target=captions, **pictured(pictures / name, PROMPT))


def of_all(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """CIDEr times 100 of all pictures, and its standard error over them."""
    said = [" ".join(words(next(iter(outcome.extracted.values())) or "")) for outcome in outcomes]
    found = cider(said, [[" ".join(words(one)) for one in example.target] for example in examples])
    mean = sum(found) / len(found)
    variance = sum((one - mean) ** 2 for one in found) / max(len(found) - 1, 1) / len(found)
    return {"score": 100 * mean, "score_stderr": 100 * variance**0.5}


def _add(name: str, title: str, file: str, pictures: str, reader, **fields) -> None:
    add_benchmark(
        Benchmark(
            name=name,
            title=title,
            folder=name,
            files=f"{file} and {pictures}/*.jpg",
            shots=0,
            read=lambda folder: reader(folder / file, folder / pictures),
            answers=Generation(
                max_new_tokens=30,
                stop=("\n",),
                extract={"caption": lambda text, _: text.strip() or None},
                # Of one caption alone; the score of the set is `of_all`.
                judge=lambda caption, example: words(caption) in [words(one) for one in example.target],
            ),
            summary=of_all,
            **fields,
        ),
        benchmark_files,
    )


_SCRIPT = "QwenLM/Qwen-VL eval_mm/evaluate_caption.py; CIDEr-D of pycocoevalcap"
_add(
    "nocaps",
    "NoCaps val",
    "nocaps_val_4500_captions.json",
    "val",
    from_coco,
    table="Qwen-VL, Table 4",
    report={"Qwen-VL": 121.4, "Qwen-VL-Chat": 120.2},
    source=f"nocaps.org; {_SCRIPT}",
    size=4500,
)
_add(
    "flickr30k",
    "Flickr30k test",
    "dataset_flickr30k.json",
    "flickr30k-images",
    from_karpathy,
    table="Qwen-VL, Table 4",
    report={"Qwen-VL": 85.8, "Qwen-VL-Chat": 81.0},
    source=f"Karpathy's splits; {_SCRIPT}",
    size=1000,
)
_add(
    "coco_captions",
    "COCO captions val",
    "annotations/captions_val2014.json",
    "val2014",
    from_coco,
    source=f"cocodataset.org; {_SCRIPT}",
    size=40504,
)
