"""Rows with pictures as tokens and loss weights."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import chatml, content
from qwen_jax.data.content import Picture, Reference, Region, Unusable, parse_parts, parse_tags
from qwen_jax.data.conversations import check, from_openai, read_parts
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.data.vision import VisionChatRows, VisionRows
from qwen_jax.evaluation.vision.grounding import to_pixels

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden" / "qwenvl_full" / "vl_tokens.json"
PLACES = 3
TWO = {"type": "text", "text": "two"}
IMAGE = {"type": "image", "image": "a.png"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def shown(tokenizer: Tokenizer, encoded) -> tuple[str, str]:
    """Text of all tokens, and of those with loss; the places of a picture as one sign."""
    whole = tokenizer.decode(encoded.tokens)
    learned = tokenizer.decode([t for t, w in zip(encoded.tokens, encoded.loss_weights, strict=True) if w])
    return whole.replace("<img>" + "<imgpad>" * PLACES + "</img>", "▣"), learned


def rows(kind: str) -> VisionRows:
    return VisionRows(kind, PLACES)


@pytest.mark.parametrize(
    ("kind", "row", "whole", "learned"),
    [
        (
            "pairs",
            {"image": "a.png", "text": "a red square"},
            "▣Generate the caption in English: a red square<|endoftext|>",
            " a red square<|endoftext|>",
        ),
        (
            "pairs",
            {"image": "a.png", "text": "红色的正方形, a"},
            "▣Generate the caption in Chinese: 红色的正方形, a<|endoftext|>",
            " 红色的正方形, a<|endoftext|>",
        ),
        (
            "grounding",
            {
                "image": "a.png",
                "text": [
                    {"type": "box", "ref": "Two bees", "boxes": [[661, 612, 833, 812], [120, 555, 265, 770]]},
                    {"type": "text", "text": " gathering nectar"},
                ],
            },
            "▣Generate the caption in English with grounding:<ref> Two bees</ref><box>(661,612),(833,812)</box>"
            "<box>(120,555),(265,770)</box> gathering nectar<|endoftext|>",
            "<ref> Two bees</ref><box>(661,612),(833,812)</box><box>(120,555),(265,770)</box> gathering nectar"
            "<|endoftext|>",
        ),
        (
            "documents",
            {"content": [TWO | {"text": "one "}, IMAGE, TWO]},
            "one ▣two<|endoftext|>",
            "one two<|endoftext|>",
        ),
        (
            "vqa",
            {"image": ["a.png", "b.png"], "question": "Which is red?", "answer": "the second"},
            "▣▣Which is red? Answer: the second<|endoftext|>",
            " the second<|endoftext|>",
        ),
        (
            "referring",
            {"image": "a.png", "ref": "the ear", "boxes": [[176, 106, 232, 160]]},
            "▣<ref>the ear</ref><box>(176,106),(232,160)</box><|endoftext|>",
            "<box>(176,106),(232,160)</box><|endoftext|>",
        ),
        (
            "grounded_captions",
            {"image": "a.png", "boxes": [[360, 542, 476, 705]], "text": "yellow gloves"},
            "▣<ref>This</ref><box>(360,542),(476,705)</box> is yellow gloves<|endoftext|>",
            " yellow gloves<|endoftext|>",
        ),
        (
            "ocr",
            {
                "image": "a.png",
                "lines": [
                    {"text": "EXIT", "quad": [10, 20, 90, 21, 90, 40, 10, 39]},
                    {"text": "<img>出口", "box": [10, 50, 90, 60]},
                ],
            },
            "▣OCR with grounding: <ref>EXIT</ref><quad>(10,20),(90,21),(90,40),(10,39)</quad>"
            "<ref><img>出口</ref><box>(10,50),(90,60)</box><|endoftext|>",
            " <ref>EXIT</ref><quad>(10,20),(90,21),(90,40),(10,39)</quad>"
            "<ref><img>出口</ref><box>(10,50),(90,60)</box><|endoftext|>",
        ),
    ],
)
def test_each_kind_asks_without_loss_and_answers_with_it(tokenizer, kind, row, whole, learned):
    encoded = rows(kind).encode(row, tokenizer)
    assert shown(tokenizer, encoded) == (whole, learned)
    assert encoded.images == (("a.png", "b.png") if kind == "vqa" else ("a.png",))
    # What a row writes as `<img>` is text: there is one control token for each picture.
    assert encoded.tokens.tolist().count(tokenizer.vision_tokens["<img>"]) == len(encoded.images)


GRIT = {"image": "a.jpg", "caption": "a cat on a red mat", "width": 640, "height": 480}
COCO = {"image": "a.jpg", "ref": "the cat", "bbox": [64, 48.0, 320, 96.5], "width": 640, "height": 480}


@pytest.mark.parametrize(
    ("layout", "kind", "row", "expected"),
    [
        (
            "grit",
            "grounding",
            GRIT | {"ref_exps": [[9, 18, 0.1, 0.5, 0.9, 1.0, 0.98], [0, 5, 0.25, 0.1, 0.5, 0.6, 0.9]]},
            "▣Generate the caption in English with grounding:<ref> a cat</ref><box>(250,100),(500,600)</box> on "
            "<ref>a red mat</ref><box>(100,500),(900,999)</box><|endoftext|>",
        ),
        (  # two boxes of one phrase, and a phrase within a longer one
            "grit",
            "grounding",
            GRIT
            | {
                "ref_exps": [
                    [2, 5, 0, 0, 0.1, 0.1, 1],
                    [2, 5, 0.5, 0.5, 1, 1, 1],
                    [9, 18, 0, 0, 1, 1, 1],
                    [15, 18, 0, 0, 0.3, 0.3, 1],
                ]
            },
            "▣Generate the caption in English with grounding: a <ref>cat</ref><box>(0,0),(100,100)</box>"
            "<box>(500,500),(999,999)</box> on <ref>a red mat</ref><box>(0,0),(999,999)</box><|endoftext|>",
        ),
        ("refcoco", "referring", COCO, "▣<ref>the cat</ref><box>(100,100),(600,301)</box><|endoftext|>"),
        (
            "refcoco",
            "grounded_captions",
            COCO,
            "▣<ref>This</ref><box>(100,100),(600,301)</box> is the cat<|endoftext|>",
        ),
    ],
)
def test_rows_of_well_known_data_sets(tokenizer, layout, kind, row, expected):
    encoded = VisionRows(kind, PLACES, layout).encode(row, tokenizer)
    assert shown(tokenizer, encoded)[0] == expected and encoded.images == ("a.jpg",)


@pytest.mark.parametrize(
    ("layout", "kind", "row", "message"),
    [
        ("grit", "grounding", GRIT, "expected a field 'ref_exps', found image, caption, width, height"),
        ("grit", "grounding", GRIT | {"ref_exps": []}, "a caption without a box"),
        (
            "grit",
            "grounding",
            GRIT | {"ref_exps": [[0, 99, 0, 0, 1, 1, 1]]},
            "phrase outside .*phrase 0: 0 to 99 of 18",
        ),
        ("grit", "grounding", GRIT | {"ref_exps": [[0, 5]]}, r"expected \[start, end, x1.*found \[0, 5\]"),
        ("grit", "grounding", GRIT | {"ref_exps": [[0, 5, 0.9, 0, 0.1, 1, 1]]}, "corners are in the wrong order"),
        ("refcoco", "referring", COCO | {"bbox": [1, 2, 3]}, r"expected x, y, width and height in 'bbox', found \[1"),
        ("refcoco", "referring", COCO | {"width": 0}, r"expected pixels in 'width' and 'height', found \[0, 480\]"),
    ],
)
def test_damaged_rows_of_well_known_data_sets(tokenizer, layout, kind, row, message):
    with pytest.raises(ValueError, match=message):
        VisionRows(kind, PLACES, layout).encode(row, tokenizer)


def test_a_layout_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="vision_referring.layout is 'grit': layouts besides '' are 'refcoco'"):
        VisionRows("referring", PLACES, "grit")
    with pytest.raises(ValueError, match="vision_pairs.layout is 'grit': layouts besides '' are none"):
        VisionRows("pairs", PLACES, "grit")


def test_a_dialogue_numbers_its_pictures(tokenizer):
    box = {"type": "box", "ref": "it", "boxes": [[0, 0, 999, 999]]}
    row = {
        "messages": [
            {
                "role": "user",
                "content": [IMAGE, IMAGE | {"image": "b.png"}, TWO | {"text": "Same?"}],
            },
            {"role": "assistant", "content": "No. <img>"},
            {"role": "user", "content": [TWO | {"text": "And "}, IMAGE]},
            {"role": "assistant", "content": [TWO | {"text": "See "}, box, IMAGE]},
        ]
    }
    encoded = VisionChatRows(loss_on="report", system="s", num_queries=PLACES).encode(row, tokenizer)
    whole, learned = shown(tokenizer, encoded)
    assert whole == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nPicture 1: ▣\nPicture 2: ▣\nSame?<|im_end|>\n"
        "<|im_start|>assistant\nNo. <img><|im_end|>\n<|im_start|>user\nAnd Picture 3: ▣\n<|im_end|>\n"
        "<|im_start|>assistant\nSee <ref>it</ref><box>(0,0),(999,999)</box>Picture 4: ▣\n<|im_end|>\n"
    )
    assert learned == "No. <img><|im_end|>See <ref>it</ref><box>(0,0),(999,999)</box>Picture 4: \n<|im_end|>"
    assert encoded.images == ("a.png", "b.png", "a.png", "a.png") and len(encoded.turn_ends) == 2
    released = VisionChatRows(system="s", num_queries=PLACES).encode(row, tokenizer)
    assert shown(tokenizer, released)[1].startswith("<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>No.")


def test_three_layouts_give_one_dialogue(tokenizer):
    messages = [
        {"role": "user", "content": [IMAGE, TWO | {"text": "What is it?"}]},
        {"role": "assistant", "content": "A square."},
    ]
    asked = "Picture 1: <img>a.png</img>\nWhat is it?"
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": "A square."}]
    llava = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    found = [
        VisionChatRows(layout, num_queries=PLACES).encode(row, tokenizer)
        for layout, row in (
            ("messages", {"messages": messages}),
            ("released", {"id": "1", "conversations": turns}),
            ("llava", {"id": "1", "image": "a.png", "conversations": llava}),
        )
    ]
    for one in found[1:]:
        assert one.tokens.tolist() == found[0].tokens.tolist() and one.images == found[0].images == ("a.png",)
        assert one.loss_weights.tolist() == found[0].loss_weights.tolist()


def test_text_alone_is_what_chat_tasks_make_of_it(tokenizer):
    from qwen_jax.data.chat import ChatRows

    row = {"messages": [{"role": "user", "content": "<img>a</img>"}, {"role": "assistant", "content": "<box>"}]}
    with_pictures, without = VisionChatRows().encode(row, tokenizer), ChatRows().encode(row, tokenizer)
    assert with_pictures.tokens.tolist() == without.tokens.tolist() and with_pictures.images == ()
    assert max(without.tokens) < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("pairs", {"image": "a.png", "text": " "}, "a picture without text"),
        ("grounding", {"image": "a.png", "text": "a red square"}, "a caption without a box"),
        ("documents", {"content": [{"type": "text", "text": "x"}]}, "a row without a picture"),
        ("documents", {"content": [{"type": "video"}]}, "a part that is no text, image, box or quad"),
        ("documents", {"content": [{"type": "image", "image": ""}]}, "a part of type image without a image"),
        ("vqa", {"image": "a.png", "question": "Q", "answer": " "}, "an empty answer"),
        ("referring", {"image": "a.png", "ref": "x", "boxes": []}, "a row without boxes"),
        ("referring", {"image": "a.png", "ref": "x", "boxes": [[0, 0, 1000, 5]]}, "coordinates that are no integers"),
        ("referring", {"image": "a.png", "ref": "x", "boxes": [[0, 0, 0.5, 5]]}, "coordinates that are no integers"),
        ("referring", {"image": "a.png", "ref": "x", "boxes": [[5, 0, 4, 5]]}, "a box whose corners are in the wrong"),
        ("referring", {"image": "a.png", "ref": "x", "boxes": [[5, 0, 4]]}, "a region without 4 numbers"),
        ("ocr", {"image": "a.png", "lines": []}, "a picture without lines of text"),
    ],
)
def test_rows_that_teach_nothing_have_a_reason(tokenizer, kind, row, reason):
    with pytest.raises(Unusable) as caught:
        rows(kind).encode(row, tokenizer)
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairs", {"text": "x"}, "expected a field 'image', found text"),
        ("pairs", {"image": 3, "text": "x"}, "expected the path of a picture, or a list of them, in 'image', found 3"),
        ("vqa", {"image": "a.png", "question": 1, "answer": "x"}, "expected text in 'question', found int"),
    ],
)
def test_another_layout_is_an_error(tokenizer, kind, row, message):
    with pytest.raises(ValueError, match=message):
        rows(kind).encode(row, tokenizer)


@pytest.mark.parametrize(
    ("layout", "value", "reason"),
    [
        ("released", "<img>a.png", "a <img> without its other half"),
        ("released", "a.png</img>", "a </img> without its other half"),
        ("released", "<img>a<ref>b</ref></img>", "a <img> without its other half"),
        ("released", "<imgpad>", "a <imgpad> without its other half"),
        ("released", "<img></img>", "an <img> without a path"),
        ("released", "<box>left</box>", "a <box> that holds no corners"),
        ("released", "<box>(1,2),(3,1000)</box>", "coordinates that are no integers"),
        ("llava", "<image><image>", "more places for pictures than pictures"),
        ("llava", "no place", "more pictures than places for them"),
    ],
)
def test_tags_must_be_whole(tokenizer, layout, value, reason):
    row = {"image": "a.png", "conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": "x"}]}
    with pytest.raises(Unusable) as caught:
        VisionChatRows(layout).encode(row, tokenizer)
    assert caught.value.reason.startswith(reason)


def test_pictures_do_not_stand_beside_tools():
    messages = [
        {"role": "user", "content": [IMAGE]},
        {"role": "assistant", "content": "x"},
    ]
    tools = [{"name": "t", "description": "", "parameters": {}}]
    with pytest.raises(Unusable, match="pictures or regions in a conversation with tools"):
        check(from_openai({"messages": messages, "tools": tools}, read_parts))
    with pytest.raises(Unusable, match="content that is no text"):
        from_openai({"messages": messages})


def test_rows_of_a_picture_are_held_out_together():
    one, two = {"image": "a.png", "text": "x"}, {"image": "a.png", "text": "y"}
    assert rows("pairs").group(one) == rows("pairs").group(two) != rows("pairs").group(one | {"image": "b.png"})
    assert rows("pairs").group({"text": "x"}) == '{"text": "x"}'
    row = {"messages": [{"role": "user", "content": [IMAGE]}]}
    assert VisionChatRows().group(row) == "a.png"


number = st.integers(0, 999)
regions = st.one_of(
    st.tuples(number, number, number, number).map(
        lambda n: Region(((min(n[0], n[2]), min(n[1], n[3])), (max(n[0], n[2]), max(n[1], n[3]))))
    ),
    st.lists(st.tuples(number, number), min_size=4, max_size=4).map(lambda points: Region(tuple(points))),
)
texts = st.text(max_size=8) | st.sampled_from(["<img>", "</img>", "<box>(1,2),(3,4)</box>", "<imgpad>", "<|im_end|>"])
parts = st.lists(texts | regions | texts.map(Reference) | st.just(Picture("a.png")), max_size=6).map(tuple)


@given(some=parts)
def test_only_parts_become_control_tokens(tokenizer, some):
    ids = content.encode(tokenizer, some, PLACES)
    control = [tokenizer.decode([one]) for one in ids if one >= tokenizer.num_ranks]
    expected = []
    for part in some:
        if isinstance(part, Picture):
            expected += ["<img>", *["<imgpad>"] * PLACES, "</img>"]
        elif isinstance(part, Reference):
            expected += ["<ref>", "</ref>"]
        elif isinstance(part, Region):
            tag = "box" if len(part.points) == 2 else "quad"
            expected += [f"<{tag}>", f"</{tag}>"]
    assert control == expected
    assert content.outside_pictures(tokenizer, ids).sum() == len(ids) - (PLACES + 2) * len(content.pictures(some))


@given(some=st.lists(regions | st.just(Picture("a.png")) | st.sampled_from(["x", " y\n"]).map(Reference), max_size=5))
def test_tags_are_read_as_they_are_written(some):
    assert list(parse_tags(content.written(some), "here")) == some


def test_pixels_become_thousandths_and_come_back():
    assert content.thousandths([0, 0, 640, 480], 640, 480) == [0, 0, 999, 999]
    assert content.thousandths([64.2, -3, 320, 479], 640, 480) == [100, 0, 500, 998]
    box = (30.0, 41.5, 611.25, 300.0)
    found = to_pixels(tuple(content.thousandths(box, 640, 480)), 640, 480, units=1000)
    assert found == pytest.approx(box, abs=0.33)


def test_json_parts_are_read():
    given_parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": "b.png"},
        {"type": "box", "boxes": [[1, 2, 3, 4]]},
        {"type": "quad", "ref": "r", "quads": [[1, 2, 3, 4, 5, 6, 7, 8]]},
    ]
    quad = Region(((1, 2), (3, 4), (5, 6), (7, 8)))
    assert parse_parts(given_parts, "") == ("a", Picture("b.png"), Region(((1, 2), (3, 4))), Reference("r"), quad)
    with pytest.raises(ValueError, match="message 0: content must be text, found int"):
        chatml.turns(Tokenizer(), [{"role": "user", "content": 3}])


def test_tokens_are_those_of_the_released_tokenizer(tokenizer):
    """But for the path, whose bytes the released tokenizer puts into the first places of a picture."""
    if not GOLDEN.is_file():
        pytest.skip(f"no {GOLDEN}: set QWEN_JAX_SHARED to the folder that holds golden/")
    tags, compared = tokenizer.vision_tokens, 0
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["encode"]:
        try:
            found = content.encode(tokenizer, parse_tags(case["text"], ""))
        except Unusable:
            continue  # halves of tags, which the released tokenizer lets through
        if "ids" not in case or "<|im_end|>" in case["text"]:  # in ours, this is text
            continue
        expected, inside = list(case["ids"]), False
        for place, one in enumerate(expected):
            inside = one == tags["<img>"] or (inside and one != tags["</img>"])
            if inside and one != tags["<img>"]:
                expected[place] = tags["<imgpad>"]
        assert found == expected, case["text"]
        compared += 1
    assert compared == 8


def test_labels_are_those_of_the_released_list_format():
    if not GOLDEN.is_file():
        pytest.skip(f"no {GOLDEN}: set QWEN_JAX_SHARED to the folder that holds golden/")
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["from_list_format"]
    for case in cases:
        ours = []
        for one in case["elements"]:
            kind = "box" if "box" in one else next(iter(one))
            ours.append({"boxes": one["box"]} | one if kind == "box" else dict(one))
            ours[-1]["type"] = kind
        (labelled,) = content.with_labels([parse_parts(ours, "")])
        assert content.written(labelled) == case["text"]
    assert len(cases) == 4


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_box_that_is_no_place_is_an_error_of_its_row(tokenizer, number):
    """JSON as Python reads it has such numbers."""
    with pytest.raises(ValueError, match="expected .*(inf|nan)"):
        VisionRows("grounding", PLACES, "grit").encode(GRIT | {"ref_exps": [[0, 5, number, 0, 1, 1, 1]]}, tokenizer)
    with pytest.raises(ValueError, match="expected .*(inf|nan)"):
        VisionRows("referring", PLACES, "refcoco").encode(COCO | {"bbox": [number, 0, 1, 1]}, tokenizer)
