"""Metrics of benchmarks with pictures, against the software that the published figures were made with."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.evaluation.vision.captions import cider, words
from qwen_jax.evaluation.vision.grounding import iou, read_box, to_pixels
from qwen_jax.evaluation.vision.visual_answers import anls, edit_distance, vqa_accuracy


# Printed by pycocoevalcap 1.2's PTBTokenizer (CoreNLP 3.4.1, Java 21) for these captions.
@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("Two dogs' bowls (red) on a table; 3,000 people!", "two dogs bowls -lrb- red -rrb- on a table 3,000 people"),
        (
            "black-and-white photo of St. Patrick's day at 5 p.m.",
            "black-and-white photo of st. patrick 's day at 5 p.m.",
        ),
        ('He said "hello there" -- and left...', "he said hello there and left"),
        ("a can't-miss $5.00 pizza w/ cheese & ham", "a ca n't miss $ 5.00 pizza w / cheese & ham"),
        ("cannot gonna wanna 50% off #1 @home", "can not gon na wan na 50 % off # 1 @home"),
        ("and/or either/or 1/2 3-4 10:30 10:30am", "and/or either/or 1/2 3-4 10:30 10:30 am"),
        ("It's the 1990's and '90s rock 'n' roll", "it 's the 1990 's and '90s rock 'n' roll"),
        ("U.S. flag, Mr. Smith and Dr. Who etc.", "u.s. flag mr. smith and dr. who etc."),
        ("don\u2019t \u201cquote\u201d \u2018single\u2019 \u2013 dash \u2014 long", "do n't quote single dash long"),
        ("the end . the end ?! really?!", "the end the end ?! really ?!"),
        ("mid-air t-shirt x-ray - dash -leading trailing-", "mid-air t-shirt x-ray dash leading trailing"),
        ("one--two three...four five.six", "one two three four five.six"),
        ("vs. Jan. 5th 1st 22nd o'clock d'or", "vs. jan. 5th 1st 22nd o'clock d'or"),
        ("", ""),
    ],
)
def test_captions_are_cut_into_the_words_of_ptbtokenizer(caption, tokens):
    assert " ".join(words(caption)) == tokens


CAPTIONS = [
    "a man riding a wave on top of a surfboard",
    "a black dog on the sofa",
    "two people and a dog",
    "a red square",
    "the cat the cat the cat",
]
REFERENCES = [
    ["a man rides a wave on a surfboard", "a surfer riding a large wave"],
    ["a black dog sleeps on the sofa", "a dog on a couch", "the dog is black"],
    ["two people walk a dog"],
    ["a red square", "a red square above a blue circle"],
    ["the cat", "a dog and the cat"],
]


def test_cider_is_pycocoevalcaps():
    recorded = [2.096469925146716, 2.518969113785454, 2.5812216324672175, 5.4085467603936985, 1.1090659483722118]
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(recorded, abs=1e-12)


def test_cider_is_pycocoevalcaps_on_random_words():
    scorer = pytest.importorskip(
        "pycocoevalcap.cider.cider_scorer", reason="pycocoevalcap is not installed: see the recorded scores"
    )
    generator = random.Random(0)
    caption = lambda: " ".join(generator.choices("abcdefgh", k=generator.randint(0, 12)))  # noqa: E731
    for count in (1, 2, 30):
        candidates = [caption() for _ in range(count)]
        references = [[caption() for _ in range(generator.randint(1, 5))] for _ in range(count)]
        theirs = scorer.CiderScorer()
        for pair in zip(candidates, references, strict=True):
            theirs += pair
        assert cider(candidates, references) == pytest.approx(theirs.compute_score()[1].tolist(), abs=1e-12)


def test_cider_says_what_is_missing():
    with pytest.raises(ValueError, match="2 captions for the references of 1 pictures"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="picture 1 has no reference caption"):
        cider(["a", "b"], [["a"], []])


# Printed by GT-Vision-Lab/VQA's vqaEval.py at a013f00 and by QwenLM/Qwen-VL's eval_mm/vqa_eval.py at aa00ed0.
@pytest.mark.parametrize(
    ("answer", "references", "official", "released"),
    [
        ("two", {"2": 3, "two": 4, "3": 3}, 1.0, 0.9),
        ("2", {"Two": 10}, 0.0, 0.0),
        ("Two", {"Two": 10}, 1.0, 0.0),
        ("the red dog", {"red dog": 2, "dog": 8}, 0.6, 0.6),
        ("dog.", {"dog": 1, "dogs": 9}, 0.3, 0.3),
        ("red, white", {"red white": 3, "red,white": 2, "white": 5}, 1.0, 1.0),
        ("1,000", {"1000": 4, "1,000": 2, "10 00": 4}, 1.0, 1.0),
        ("10:30.", {"10:30": 3, "half past ten": 7}, 0.9, 0.9),
        ("dont know", {"don't know": 2, "no": 8}, 0.6, 0.6),
        ("t-shirt", {"t shirt": 5, "shirt": 5}, 1.0, 1.0),
        ("none", {"0": 3, "no": 7}, 0.9, 0.9),
        ("yes\n", {"yes": 10}, 1.0, 1.0),
        ("somebody'd", {"somebodyd": 6, "x": 4}, 1.0, 1.0),
        ("U.S.A.", {"usa": 9, "us": 1}, 1.0, 1.0),
    ],
)
def test_vqa_accuracy_is_that_of_both_evaluation_codes(answer, references, official, released):
    ten = [text for text, count in references.items() for _ in range(count)]
    assert vqa_accuracy(answer, ten) == pytest.approx(official, abs=1e-9)
    assert vqa_accuracy(answer, ten, released=True) == pytest.approx(released, abs=1e-9)


@given(
    st.lists(st.sampled_from(["a dog", "dog", "2", "two", "cat."]), min_size=10, max_size=10),
    st.permutations(range(10)),
)
def test_vqa_accuracy_does_not_depend_on_the_order_of_references(references, order):
    found = vqa_accuracy("dog", references)
    assert found == pytest.approx(vqa_accuracy("dog", [references[i] for i in order]))
    # Leaving one out of four equal ones leaves three: full marks.
    equal = sum(one in ("dog", "a dog") for one in references) if len(set(references)) > 1 else references.count("dog")
    assert (found == pytest.approx(1)) == (equal >= 4)


def test_vqa_accuracy_needs_several_references():
    with pytest.raises(ValueError, match="needs several reference answers, found 1"):
        vqa_accuracy("a", ["a"])


def test_anls_is_that_of_the_package():
    # Printed by anls 0.0.2.
    assert anls("4/29/2005", ["4/29/2005"]) == 1
    assert anls(" Zero  SPAN ", ["zero span", "x"]) == 1
    assert anls("4/28/2005", ["4/29/2005"]) == pytest.approx(8 / 9)
    assert anls("ab", ["abcd"]) == 0  # half of the characters differ: not below the threshold
    assert anls("", [""]) == 1 and anls("", ["a"]) == 0
    with pytest.raises(ValueError, match="needs a reference"):
        anls("a", [])


short = st.text("abC 1", max_size=8)


@given(short, st.lists(short, min_size=1, max_size=3))
def test_anls_is_that_of_the_package_on_any_text(answer, references):
    package = pytest.importorskip("anls", reason="anls is not installed: see the recorded scores")
    assert anls(answer, references) == pytest.approx(package.anls_score(answer, references))


@given(short, short, short)
def test_edit_distance_is_a_distance(one, two, three):
    assert edit_distance(one, two) == edit_distance(two, one) <= max(len(one), len(two))
    assert (edit_distance(one, two) == 0) == (one == two)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)


def test_boxes_are_read_as_the_released_evaluation_does():
    assert read_box("<ref>it</ref><box>(12,40),(530,999)</box><box>(1,2),(3,4)</box>") == (12, 40, 530, 999)
    assert read_box("(1, 2),(3.5, 4)") == (1, 2, 3.5, 4)
    without = ("", "no box", "(1,2) and (3,4)", "(a,b),(3,4)", "(1),(2,3)", "(1,2,3),(4,5)")
    for text in (*without, "(nan,2),(3,4)", "(1,2),(1e999,4)"):
        assert read_box(text) is None, text


def test_both_inversions_of_coordinates():
    assert to_pixels((0, 0, 999, 999), 640, 480) == (0, 0, 640, 480)
    assert to_pixels((0, 0, 999, 999), 640, 480, units=1000) == pytest.approx((0, 0, 639.36, 479.52))


def test_intersection_over_union():
    assert iou((0, 0, 10, 10), (5, 5, 15, 15)) == pytest.approx(25 / 175)
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0 == iou((0, 0, 0, 0), (0, 0, 0, 0))
    assert iou((0, 0, 0, 0), (1, 1, 3, 3)) == 0
