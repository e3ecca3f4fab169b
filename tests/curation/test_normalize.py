"""Tokens and shingles, against the same thing written with strings and sets."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.curation import dedup, normalize

TEXTS = st.lists(st.text(st.sampled_from("ab C１２ß,.-\n 你好世界。éÉıΣς_\ud800ァ"), max_size=60), max_size=6)


def plain_tokens(text: str) -> list[str]:
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    classes = normalize.character_classes()
    tokens, last = [], normalize.SEPARATOR
    for character in folded:
        kind = classes[ord(character)]
        if kind == normalize.IDEOGRAPH or (kind == normalize.WORD and last != normalize.WORD):
            tokens.append(character)
        elif kind == normalize.WORD:
            tokens[-1] += character
        last = kind
    return tokens


def plain_shingles(text: str, size: int) -> set[str]:
    tokens = plain_tokens(text)
    starts = range(max(1, len(tokens) - size + 1)) if tokens else ()
    return {" ".join(tokens[start : start + size]) for start in starts}


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 5))
def test_hashes_stand_for_tokens_and_sets_for_sets(texts, size):
    tokens = normalize.tokenize(texts)
    names = {}
    for number, text in enumerate(texts):
        mine = tokens.hashes[tokens.offsets[number] : tokens.offsets[number + 1]].tolist()
        expected = plain_tokens(text)
        assert len(mine) == len(expected)
        for one, name in zip(mine, expected, strict=True):
            assert names.setdefault(one, name) == name
    assert len(set(names.values())) == len(names)
    sets, offsets = normalize.shingles(tokens, size)
    for number, text in enumerate(texts):
        mine = sets[offsets[number] : offsets[number + 1]]
        assert (np.diff(mine.astype(np.int64)) > 0).all()
        assert len(mine) == len(plain_shingles(text, size))
        alone, _ = normalize.shingles(normalize.tokenize([text]), size)
        assert mine.tolist() == alone.tolist()  # a document is the same in any company


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("The  quick, brown FOX!", "the quick brown fox"),
        ("ｔｈｅ ﬁnal １２３", "The final 123"),
        ("今天，天气很好。", "今天 天气很好"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
    ],
)
def test_texts_that_differ_in_case_space_punctuation_and_forms_are_equal(left, right):
    a, b = dedup.digests(normalize.tokenize([left, right]))
    assert a.tolist() == b.tolist()


@pytest.mark.parametrize(("left", "right"), [("ab c", "a bc"), ("今天", "天今"), ("a b", "b a"), ("x1", "x 1")])
def test_texts_that_differ_in_tokens_are_not(left, right):
    a, b = dedup.digests(normalize.tokenize([left, right]))
    assert a.tolist() != b.tolist()


def test_words_are_what_a_regular_expression_finds_in_english():
    text = "It's 2023: the model (7B) costs $3.50, doesn't it?\n\tYes -- it does."
    assert plain_tokens(text) == re.findall(r"[^\W_]+", text.lower())
