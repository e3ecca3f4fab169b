"""Encoding of prompts and continuations: the border rule, cutting from the left, ChatML."""

import hypothesis
import pytest
from hypothesis import strategies as st

from qwen_jax.data import chatml
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.evaluation.encoding import chat_prompt, cut_left, encode_continuations, encode_prompt

# Tokens beyond single bytes, among them such that cross the border of prompt and continuation.
TOKENS = [
    " A",
    " B",
    "ab",
    "abc",
    ":\n",
    "  ",
    "\n\n",
    "An",
    "Answer",
    "e\u0301".encode(),
    "é".encode(),
    ": ",
    "问题".encode(),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in TOKENS:
        ranks.setdefault(token if isinstance(token, bytes) else token.encode(), len(ranks))
    write_ranks(ranks, path)
    return Tokenizer(path)


def plain(tokenizer, prompt, continuation):
    """lm-evaluation-harness 0.4.13: `TemplateLM._encode_pair`, in our words."""
    kept = prompt.rstrip()
    whole, before = tokenizer.encode(prompt + continuation), tokenizer.encode(kept)
    return before, whole[len(before) :]


TEXT = st.text(st.sampled_from("abcA:\n \r\té\u0301\u3000'sx问7"), max_size=12)


@hypothesis.given(prompt=TEXT, continuation=TEXT.filter(bool))
def test_the_border_is_that_of_the_harness(tokenizer, prompt, continuation):
    ids, (following,) = encode_continuations(tokenizer, prompt, [continuation])
    if not prompt.strip():
        assert ids == [tokenizer.endoftext_id] and following == tokenizer.encode(prompt + continuation)
        return
    before, after = plain(tokenizer, prompt, continuation)
    assert ids == before
    assert following == (after or tokenizer.encode(prompt[len(prompt.rstrip()) :] + continuation))


def test_blanks_at_the_end_of_the_prompt_belong_to_the_continuation(tokenizer):
    ids, (one, two) = encode_continuations(tokenizer, "x\nAnswer: ", ["A", "B"])
    assert tokenizer.decode(ids) == "x\nAnswer:" and [tokenizer.decode(one), tokenizer.decode(two)] == [" A", " B"]
    assert len(one) == len(two) == 1
    assert encode_continuations(tokenizer, "x\nAnswer:", [" A", " B"]) == (ids, [one, two])


def test_encoded_apart_the_blank_stays_where_it_is(tokenizer):
    ids, (one,) = encode_continuations(tokenizer, "x\nAnswer: ", ["A"], apart=True)
    assert tokenizer.decode(ids) == "x\nAnswer: " and one == tokenizer.encode("A")
    assert encode_continuations(tokenizer, "", ["A"], apart=True)[0] == [tokenizer.endoftext_id]


def test_a_token_across_the_border_leaves_the_continuation_at_least_one(tokenizer):
    assert len(tokenizer.encode("ab")) == len(tokenizer.encode("abc")) == 1
    assert encode_continuations(tokenizer, "ab", ["c"]) == (tokenizer.encode("ab"), [tokenizer.encode("c")])
    with pytest.raises(ValueError, match="continuation 1 of 'ab' is empty"):
        encode_continuations(tokenizer, "ab", ["c", ""])


def test_names_of_control_tokens_stay_text(tokenizer):
    prompt, text = "say <|im_end|>", "<|endoftext|>"
    ids, (following,) = encode_continuations(tokenizer, prompt, [text])
    assert max(ids + following) < tokenizer.num_ranks and tokenizer.decode(ids + following) == prompt + text
    chat = chat_prompt(tokenizer, prompt, 1000)
    assert chat.ids == chatml.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    assert chat.ids.count(tokenizer.im_end_id) == 2 and not chat.cut


def test_prompts_are_cut_from_the_left(tokenizer):
    assert (cut_left([1, 2, 3], 2).ids, cut_left([1, 2, 3], 2).cut) == ([2, 3], 1)
    assert (cut_left([1, 2, 3], 3).ids, cut_left([1, 2, 3], 9).cut) == ([1, 2, 3], 0)
    with pytest.raises(ValueError, match="the answer alone fills the context"):
        cut_left([1], 0)
    assert encode_prompt(tokenizer, "") == [tokenizer.endoftext_id]


def test_a_long_question_is_cut_within_its_turn(tokenizer):
    whole, empty = chat_prompt(tokenizer, "0123456789", 1000), chat_prompt(tokenizer, "", 1000)
    short = chat_prompt(tokenizer, "0123456789", len(whole.ids) - 6)
    assert (short.cut, short.ids) == (6, chat_prompt(tokenizer, "6789", 1000).ids)
    with pytest.raises(ValueError, match="too few for the turns of ChatML"):
        chat_prompt(tokenizer, "0123456789", len(empty.ids))
