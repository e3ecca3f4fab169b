"""The plan of scoring: every token is computed after those of its own text, and no common prefix twice."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.inference.prefix_tree import PrefixTree, Reads

# A few texts of a few letters, which often begin alike and are prefixes of each other.
PIECES = st.lists(st.sampled_from(["a", "b", "ab" * 9, "c" * 30, "abc" * 20]), min_size=1, max_size=4).map("".join)
TEXTS = st.sets(PIECES, min_size=1, max_size=12).map(sorted)


def as_ids(text):
    return np.asarray([ord(letter) for letter in text], np.int32)


def tree_of(texts, most, unit):
    """Each token of each text is read; the id of a read is 1000 times the text plus the position."""
    sequences = [as_ids(text) for text in texts]
    reads = [Reads(np.arange(len(text)), 1000 * index + np.arange(len(text))) for index, text in enumerate(texts)]
    return PrefixTree(sequences, reads, most, unit)


@hypothesis.given(texts=TEXTS, sizes=st.sampled_from([(8, 2), (24, 8), (64, 64)]), lanes=st.integers(1, 3))
def test_each_read_comes_once_after_the_tokens_of_its_text(texts, sizes, lanes):
    made = []
    for steps in tree_of(texts, *sizes).lanes(lanes):
        cache = np.zeros(0, np.int32)
        for step in steps:
            assert 0 < len(step.tokens) <= sizes[0] and step.start <= len(cache)
            assert step.depths[0] == step.start
            index = np.arange(len(step.tokens))
            for slot, read in zip(step.slots, step.ids, strict=True):
                seen = (index <= slot) & (slot < step.ends)
                text, position = divmod(int(read), 1000)
                context = np.concatenate([cache[: step.start], step.tokens[seen]])
                np.testing.assert_array_equal(context, as_ids(texts[text])[: position + 1])
                assert step.depths[slot] == position
                np.testing.assert_array_equal(step.depths[seen], step.start + np.arange(seen.sum()))
                made.append(int(read))
            if step.kept:
                cache = np.concatenate([cache[: step.start], step.tokens])
                np.testing.assert_array_equal(step.ends, len(index))
    wanted = [1000 * text + position for text, content in enumerate(texts) for position in range(len(content))]
    assert sorted(made) == wanted


def computed(texts, most=64, unit=8, lanes=1):
    return sum(len(step.tokens) for steps in tree_of(texts, most, unit).lanes(lanes) for step in steps)


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        # Four answers to one question; thirty questions after the same hundred tokens, with four answers each.
        (["q" * 40 + answer for answer in ("a", "bb", "cc", "dd")], 47),
        (["s" * 100 + chr(33 + n) * 10 + answer for n in range(30) for answer in "abcd"], 100 + 30 * 14),
        # Two such sets, of which one begins like the other.
        (["s" * 100 + x + chr(33 + n) * 10 for n in range(30) for x in ("", "x" * 80)], 100 + 80 + 2 * 30 * 10),
        (["a" * 500], 500),
        (["a" * 500, "a" * 300], 500),
    ],
)
def test_a_common_prefix_is_computed_once(texts, tokens):
    assert computed(texts) == tokens


def test_a_short_common_prefix_is_repeated_rather_than_cached():
    """To enter it would fill a step of eight tokens, for three."""
    assert computed(["a" + "b" * 90, "a" + "c" * 90, "a" + "d" * 90]) == 3 * 91


def test_lanes_share_the_work():
    texts = ["s" * 100 + chr(200 + n) * 5 for n in range(300)]
    loads = [sum(len(step.tokens) for step in steps) for steps in tree_of(texts, 64, 8).lanes(4)]
    assert min(loads) > 0.6 * max(loads) and sum(loads) == 300 * 5 + 4 * 100
