"""Benchmarks with pictures. The pictures themselves are read only when a model answers."""

import pickle
from pathlib import Path

from qwen_jax.evaluation.benchmark import Example
from tests.evaluation.published import Published, write_json

ANSWERS = ("cat", "red car", "yes")


def _vqa(folder: Path, questions: str, annotations: str) -> None:
    rows = [{"question_id": n, "image_id": 7, "question": f"What is {n}?"} for n in range(3)]
    write_json(folder / questions, {"questions": rows})
    answers = [[{"answer": ANSWERS[n], "answer_id": k} for k in range(1, 11)] for n in range(3)]
    rows = [{"question_id": n, "image_id": 7, "answers": answers[n]} for n in (2, 0, 1)]
    write_json(folder / annotations, {"annotations": rows})


def vqav2(folder: Path) -> None:
    _vqa(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")


def okvqa(folder: Path) -> None:
    _vqa(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def textvqa(folder: Path) -> None:
    rows = [
        {"question_id": n, "image_id": f"{n:04x}", "question": f"what is {n}?", "answers": [ANSWERS[n]] * 10}
        for n in range(3)
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def docvqa(folder: Path) -> None:
    rows = [
        {"questionId": n, "question": f"What is {n}?", "image": f"documents/{n}.png", "answers": ["x", ANSWERS[n]]}
        for n in range(3)
    ]
    write_json(folder / "val/val_v1.0.json", {"dataset_name": "docvqa", "data": rows})


def scienceqa(folder: Path) -> None:
    problems = {
        str(n): {
            "question": f"Which is {n}?",
            "choices": ["one", "two", "three"][: 2 + n % 2],
            "answer": n % 2,
            "hint": "" if n else "Look.",
            "image": None if n == 2 else "image.png",
            "split": "test",
        }
        for n in range(4)
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "test": ["3", "0", "1", "2"]})


def seed_bench(folder: Path) -> None:
    def row(n: int, kind: str) -> dict:
        choices = {f"choice_{letter}": f"{letter} {n}" for letter in "abcd"}
        answer = {"answer": "ABCD"[n], "data_id": f"{n}_1", "data_type": kind, "question": f"Which is {n}?"}
        return choices | answer | {"question_id": f"{kind[0]}{n}", "question_type_id": 1 if n < 2 else 5}

    rows = [*(row(n, "image") for n in range(4)), row(1, "video")]
    kinds = {"Scene Understanding": 1, "Instances Counting": 5}
    write_json(folder / "SEED-Bench.json", {"questions": rows, "question_type": kinds})


def mme(folder: Path) -> None:
    place = folder / "eval_tool/Your_Results"
    place.mkdir(parents=True)
    for task in ("existence", "OCR", "code_reasoning"):
        lines = [f"{n}.jpg\tIs it {n}? Please answer yes or no.\t{word}" for n in range(2) for word in ("Yes", "No")]
        (place / f"{task}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _captions(n: int) -> list[str]:
    return [f"a picture of number{n} beside some{n} thing{n}"] * 2


def coco(file: str):
    def write(folder: Path) -> None:
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
        annotations = [{"image_id": n, "id": 9, "caption": text} for n in range(3) for text in _captions(n)]
        write_json(folder / file, {"images": images, "annotations": annotations})

    return write


def flickr30k(folder: Path) -> None:
    def row(n: int) -> dict:
        sentences = [{"raw": text, "tokens": []} for text in _captions(n)]
        return {"filename": f"{n}.jpg", "split": "train" if n == 3 else "test", "sentences": sentences}

    write_json(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": [row(n) for n in range(4)]})


def refer(file: str, splits: tuple[str, ...]):
    def write(folder: Path) -> None:
        references = [
            {
                "ref_id": n,
                "ann_id": 10 + n,
                "image_id": 5,
                "split": split,
                "sentences": [{"sent_id": 2 * n + k, "sent": f"the {n} thing", "raw": ""} for k in range(2)],
            }
            for n, split in enumerate(("train", *splits))
        ]
        (folder / file).write_bytes(pickle.dumps(references, protocol=2))
        annotations = [{"id": 10 + n, "image_id": 5, "bbox": [10.0 * n, 20.0, 100.5, 50.0]} for n in range(4)]
        images = [{"id": 5, "file_name": "5.jpg", "width": 640, "height": 480}]
        write_json(folder / "instances.json", {"images": images, "annotations": annotations})

    return write


def _box(example: Example) -> str:
    x1, y1, x2, y2 = example.target
    width, height = example.extra["width"] / 999, example.extra["height"] / 999
    corners = (round(x1 / width), round(y1 / height)), (round(x2 / width), round(y2 / height))
    return "({},{}),({},{})</box>".format(*corners[0], *corners[1])


def _first(example: Example) -> str:
    return f" {example.target[0]}\n"


def _vision(**fields) -> Published:
    return Published(**{"shot": " Answer:", "right": _first} | fields)


def _grounding(file: str, splits: tuple[str, ...]) -> Published:
    return _vision(
        write=refer(file, splits),
        examples=2 * len(splits),
        left_out=1,
        shot="<box>",
        file="instances.json",
        wrong=('"bbox"', '"box"'),
        right=_box,
        false=lambda _: "(0,0),(1,1)",
    )


def _captioning(write, file: str, wrong: tuple[str, str], **fields) -> Published:
    return _vision(
        write=write,
        examples=3,
        left_out=1,
        shot="Describe the image in English:",
        file=file,
        wrong=wrong,
        oracle=1000,  # CIDEr is at most 10
        **fields,
    )


FILES = {
    "vqav2": _vision(
        write=vqav2,
        examples=3,
        file="v2_mscoco_val2014_annotations.json",
        wrong=('"answers"', '"replies"'),
        data="an annotation of question 262148001",
    ),
    "okvqa": _vision(write=okvqa, examples=3, file="mscoco_val2014_annotations.json", wrong=('"answers"', '"replies"')),
    "textvqa": _vision(
        write=textvqa,
        examples=3,
        file="TextVQA_0.5.1_val.json",
        wrong=('"image_id"', '"image"'),
        data=(5, 0),
    ),
    "docvqa": _vision(
        write=docvqa, examples=3, file="val/val_v1.0.json", wrong=('"answers"', '"replies"'), data=(3, 0)
    ),
    "scienceqa": _vision(
        write=scienceqa,
        examples=3,
        left_out=1,
        shot="\nAnswer:",
        file="problems.json",
        wrong=('"choices"', '"options"'),
    ),
    "seed_bench": _vision(
        write=seed_bench,
        examples=4,
        left_out=1,
        shot="\nAnswer:",
        file="SEED-Bench.json",
        wrong=('"data_id"', '"data"'),
        data=(1, 3),
    ),
    "mme": _vision(
        write=mme,
        examples=12,
        left_out=11,
        shot="<img>",
        file="eval_tool/Your_Results/OCR.txt",
        wrong=("\tYes", "\tMaybe"),
        right=lambda example: f"{example.target.title()}, it is.",
        false=lambda example: {"yes": "No.", "no": "Yes."}[example.target],
        data=(196, 0),
    ),
    "nocaps": _captioning(
        coco("nocaps_val_4500_captions.json"), "nocaps_val_4500_captions.json", ('"caption"', '"text"')
    ),
    "flickr30k": _captioning(flickr30k, "dataset_flickr30k.json", ('"filename"', '"file"')),
    "coco_captions": _captioning(
        coco("annotations/captions_val2014.json"),
        "annotations/captions_val2014.json",
        ('"file_name"', '"file"'),
        data=(5, 2),
    ),
    "refcoco": _grounding("refs(unc).p", ("val", "testA", "testB")),
    "refcoco_plus": _grounding("refs(unc).p", ("val", "testA", "testB")),
    "refcocog": _grounding("refs(umd).p", ("val", "test")),
}
