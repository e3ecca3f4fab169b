"""Training phrases of the publisher's files become rows that the tasks read."""

import json

import pytest

from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.data.vision import VisionRows
from tests.evaluation.published.vision import refer


@pytest.fixture
def published(tmp_path):
    refer("refs(unc).p", ("val", "testA"))(tmp_path)
    return tmp_path


def written(tool, folder, *flags: str) -> list[dict]:
    files = ("--references", f"{folder}/refs(unc).p", "--instances", f"{folder}/instances.json")
    tool("refcoco_rows").main([*files, "--output", f"{folder}/rows.jsonl", *flags])
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_row_for_each_phrase_of_training(tool, published, capsys):
    rows = written(tool, published)
    assert "2 rows; 2 references of other splits left out" in capsys.readouterr().out
    assert rows[0] == {
        "image": "train2014/5.jpg",
        "bbox": [0.0, 20.0, 100.5, 50.0],
        "width": 640,
        "height": 480,
        "ref": "the 0 thing",
    }
    tokenizer = Tokenizer()
    text = tokenizer.decode(VisionRows("referring", 1, "refcoco").encode(rows[0], tokenizer).tokens)
    assert text.endswith("<ref>the 0 thing</ref><box>(0,42),(157,146)</box><|endoftext|>")
    assert written(tool, published, "--pictures=/coco")[0]["image"] == "/coco/5.jpg"


def test_a_split_that_nobody_has_is_named_and_writes_nothing(tool, published):
    with pytest.raises(ValueError, match=r"refs\(unc\).p: no reference of split 'trian' among 3"):
        written(tool, published, "--split=trian")
    assert not (published / "rows.jsonl").exists()


def test_a_reference_without_its_box_is_named(tool, published):
    content = json.loads((published / "instances.json").read_text())
    content["annotations"] = content["annotations"][1:]
    (published / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"refs\(unc\).p: item 0.*instances.json"):
        written(tool, published)
