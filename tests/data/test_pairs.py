"""Comparisons and prompts in their publishers' layouts, to segments of tokens."""

import contextlib
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import chatml, pairs
from qwen_jax.data.chat import ChatRows
from qwen_jax.data.conversations import Conversation, Message, Unusable
from qwen_jax.data.pairs import Pair, PairRows
from qwen_jax.data.queries import QueryRows
from qwen_jax.data.tokenizer import Tokenizer, write_ranks

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "data"
USER = {"role": "user", "content": "Q"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("pairs") / "bytes.tiktoken"
    write_ranks({bytes([byte]): byte for byte in range(256)}, path)
    return Tokenizer(path)


def _said(message: str) -> dict:
    return {"role": "assistant", "content": message}


def test_a_transcript_is_split_at_the_last_assistant_and_not_where_the_answers_part():
    """rules A6: at their common prefix, "yes" and "yonder" would be cut within the word."""
    talk = "\n\nHuman: Hi\n\nAssistant: yes?\n\nHuman: Which way?\n\nAssistant:"
    assert [pairs.split_transcript(talk + answer)[1] for answer in (" yes", " yonder")] == [" yes", " yonder"]
    pair = pairs.from_hh_rlhf({"chosen": talk + " yes", "rejected": talk + " yonder"})
    turns = (Message("user", "Hi"), Message("assistant", "yes?"), Message("user", "Which way?"))
    assert pair == Pair(Conversation(turns), "yes", "yonder")


@given(prompt=st.text(min_size=1, max_size=9), answers=st.lists(st.text(max_size=9), min_size=2, max_size=2))
def test_a_pair_is_two_whole_sides_with_weight_on_the_answers(tokenizer, prompt, answers):
    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    if not answers[0].strip() or not answers[1].strip() or tokenizer.encode(answers[0]) == tokenizer.encode(answers[1]):
        with pytest.raises(Unusable, match="empty side|equal sides"):
            PairRows().encode(row, tokenizer)
        return
    encoded = PairRows(system="S").encode(row, tokenizer)
    context = chatml.encode_prompt(tokenizer, [{"role": "user", "content": prompt}], "S")
    tokens, weights = [], []
    for answer in answers:
        ids = [*tokenizer.encode(answer), tokenizer.im_end_id]
        tokens += context + ids
        weights += [0] * len(context) + [1] * len(ids)
    assert encoded.tokens.tolist() == tokens and encoded.loss_weights.tolist() == weights
    assert encoded.segment_lengths.sum() == len(tokens) and len(encoded.segment_lengths) == 2
    first, second = encoded.segment_lengths
    assert encoded.tokens[first - 1] == encoded.tokens[first + second - 1] == tokenizer.im_end_id


SHP = {"history": "How?", "human_ref_A": "So.", "human_ref_B": "Thus.", "labels": 0, "score_ratio": 3.0}
SUMMARY = {
    "info": {"id": "t3", "post": " A long post. ", "title": "Title", "subreddit": "tifu"},
    "summaries": [{"text": " short", "policy": "ref"}, {"text": " shorter", "policy": "sup4"}],
    "choice": 1,
}
PROMPT = (Message("user", "Q"),)


@pytest.mark.parametrize(
    ("layout", "row", "pair"),
    [
        ("pairs", {"prompt": "Q", "chosen": "a", "rejected": "b"}, Pair(Conversation(PROMPT), "a", "b")),
        ("pairs", {"messages": [USER], "chosen": _said("a"), "rejected": "b"}, Pair(Conversation(PROMPT), "a", "b")),
        # trl: conversational with the prompt apart, and with the prompt in both sides.
        (
            "pairs",
            {"prompt": [USER], "chosen": [_said("a")], "rejected": [_said("b")]},
            Pair(Conversation(PROMPT), "a", "b"),
        ),
        ("pairs", {"chosen": [USER, _said("a")], "rejected": [USER, _said("b")]}, Pair(Conversation(PROMPT), "a", "b")),
        (
            "pairs",
            {"prompt": "Q", "chosen": [USER, _said("a")], "rejected": [USER, _said("b")]},
            Pair(Conversation(PROMPT), "a", "b"),
        ),
        ("shp", SHP, Pair(Conversation((Message("user", "How?"),)), "Thus.", "So.")),
        ("shp", SHP | {"labels": 1}, Pair(Conversation((Message("user", "How?"),)), "So.", "Thus.")),
        (
            "summaries",
            SUMMARY,
            Pair(
                Conversation((Message("user", "SUBREDDIT: r/tifu\n\nTITLE: Title\n\nPOST: A long post.\n\nTL;DR:"),)),
                "shorter",
                "short",
            ),
        ),
        (
            "summaries",
            SUMMARY | {"info": {"article": "News.", "site": "x", "title": "t"}, "choice": 0},
            Pair(Conversation((Message("user", "Article:\n\nNews.\n\nTL;DR:"),)), "short", "shorter"),
        ),
    ],
)
def test_layouts(tokenizer, layout, row, pair):
    assert pairs.LAYOUTS[layout](row) == pair
    assert len(PairRows(layout).encode(row, tokenizer).segment_lengths) == 2


TALK = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("pairs", {"prompt": "Q", "chosen": "a", "rejected": "a"}, "equal sides"),
        ("pairs", {"prompt": "Q", "chosen": "\u00e9", "rejected": "e\u0301"}, "equal sides"),
        ("pairs", {"prompt": "Q", "chosen": "a", "rejected": " "}, "empty side"),
        (
            "pairs",
            {"messages": [USER, _said("x")], "chosen": "a", "rejected": "b"},
            "a prompt that does not end with the user",
        ),
        (
            "pairs",
            {"chosen": [USER, _said("a")], "rejected": [{**USER, "content": "R"}, _said("b")]},
            "different prompts",
        ),
        ("pairs", {"prompt": "Q", "chosen": [USER], "rejected": "b"}, "a side that does not end with the assistant"),
        ("pairs", {"prompt": "", "chosen": "a", "rejected": "b"}, "empty turn of the user"),
        ("hh_rlhf", {"chosen": f"{TALK} a", "rejected": f"{TALK} a"}, "equal sides"),
        ("hh_rlhf", {"chosen": f"{TALK} a", "rejected": TALK}, "empty side"),
        ("hh_rlhf", {"chosen": f"{TALK} a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "different prompts"),
        (
            "hh_rlhf",
            {"chosen": "\n\nHuman: Hi", "rejected": f"{TALK} b"},
            "a transcript that does not end with Assistant",
        ),
        (
            "hh_rlhf",
            {"chosen": f"{TALK} a\n\nHuman: more", "rejected": f"{TALK} b"},
            "a transcript that does not end with Assistant",
        ),
        ("hh_rlhf", {"chosen": f"So {TALK} a", "rejected": f"So {TALK} b"}, "not a transcript that begins with Human"),
        ("shp", SHP | {"labels": 2}, "no decision in 'labels'"),
        ("shp", SHP | {"labels": None}, "no decision in 'labels'"),
        ("shp", SHP | {"human_ref_A": " "}, "empty side"),
        ("summaries", SUMMARY | {"choice": 0.5}, "no decision in 'choice'"),
        ("summaries", SUMMARY | {"choice": True}, "no decision in 'choice'"),
    ],
)
def test_what_is_no_comparison_is_named(tokenizer, layout, row, reason):
    with pytest.raises(Unusable) as error:
        PairRows(layout).encode(row, tokenizer)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("pairs", {"prompt": "Q", "chosen": "a"}, "expected a field 'rejected', found prompt, chosen"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "expected a prompt: a field 'prompt' or 'messages'"),
        ("pairs", {"prompt": "Q", "chosen": 3, "rejected": "b"}, "expected text or messages in 'chosen', found int"),
        ("hh_rlhf", {"chosen": [], "rejected": "b"}, "expected text in 'chosen', found list"),
        ("shp", SHP | {"score_ratio": None}, "expected a number in 'score_ratio', found None"),
        ("summaries", {"info": {}, "summaries": []}, "expected two objects in 'summaries'"),
        ("summaries", SUMMARY | {"info": {}}, "expected 'info' with a text 'post' or 'article'"),
    ],
)
def test_a_row_of_another_layout_is_an_error(tokenizer, layout, row, message):
    with pytest.raises(ValueError, match=message) as error:
        PairRows(layout).encode(row, tokenizer)
    assert not isinstance(error.value, Unusable)


def test_the_least_score_ratio_of_shp(tokenizer):
    assert len(PairRows("shp", min_score_ratio=3).encode(SHP, tokenizer).tokens)
    with pytest.raises(Unusable, match="score_ratio below 3.5"):
        PairRows("shp", min_score_ratio=3.5).encode(SHP, tokenizer)


def test_pairs_of_one_prompt_are_held_out_together():
    rows = PairRows("shp")
    assert rows.group(SHP) == rows.group(SHP | {"human_ref_A": "other"}) != rows.group(SHP | {"history": "Why?"})
    rows = PairRows("hh_rlhf")
    assert (
        rows.group({"chosen": f"{TALK} a"}) == rows.group({"chosen": f"{TALK} b"}) != rows.group({"chosen": f"x{TALK}"})
    )


def test_a_prompt_is_the_same_however_its_row_gives_it():
    """A side may hold it, as in trl's format without `prompt`; another answer is not another prompt."""
    group = PairRows().group
    turned = {"content": "Q", "role": "user"}
    of_one = [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": "c", "rejected": "d"},
        {"messages": [turned], "chosen": [_said("a")], "rejected": "b"},
        *({"chosen": [USER, _said(answer)], "rejected": [USER, _said("b")]} for answer in "xyz"),
    ]
    assert len({group(row) for row in of_one}) == 1
    longer = [USER, _said("a"), {**USER, "content": "R"}]
    others = [{"prompt": longer}, {"chosen": [*longer, _said("e")]}, {"prompt": "R"}]
    assert len({group(row) for row in (of_one[0], *others)}) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.sampled_from(["", "user", "Q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=4,
)
# Rows that are read, of every layout.
ROWS = {
    "pairs": {"prompt": [USER], "chosen": [_said("a")], "rejected": "b", "tools": []},
    "hh_rlhf": {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    "shp": SHP,
    "summaries": SUMMARY,
    "queries": {"messages": [{"role": "system", "content": "S"}, USER], "answer": "a", "tools": []},
    "messages": {"messages": [USER, {**_said("a"), "tool_calls": []}], "tools": []},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}], "system": "S"},
    "questions": {"question": "Q", "answer": "a", "input": "", "system": ""},
}


@pytest.mark.parametrize("layout", ROWS)
@given(data=st.data())
def test_a_row_with_anything_in_a_field_is_read_or_named(tokenizer, layout, data):
    """Nothing but ValueError, which names the row and its place."""
    rows = QueryRows() if layout == "queries" else PairRows(layout) if layout in pairs.LAYOUTS else ChatRows(layout)
    row = json.loads(json.dumps(ROWS[layout]))
    places = [(row, key) for key in row]
    for key in list(row):
        for inner in row[key] if isinstance(row[key], list) else [row[key]]:
            places += [(inner, name) for name in inner] if isinstance(inner, dict) else []
    holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    holder[key] = data.draw(JSON)
    for one in (row, data.draw(JSON)):
        if isinstance(one, dict):
            rows.group(one)
        with contextlib.suppress(ValueError):
            assert len(rows.encode(one, tokenizer).tokens)


def test_the_publishers_file_of_hh_rlhf(tokenizer):
    """Every row is a pair or is counted by a reason."""
    path = DATA / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs hh_rlhf of ../shared/data")
    counts = Counter()
    with gzip.open(path) as lines:
        for line in lines:
            row = json.loads(line)
            try:
                pair = pairs.from_hh_rlhf(row)
                PairRows("hh_rlhf").encode(row, tokenizer)
            except Unusable as error:
                counts[error.reason] += 1
                continue
            counts["pairs"] += 1
            assert row["chosen"].endswith(pair.chosen or "") and row["rejected"].rstrip().endswith(pair.rejected)
    assert sum(counts.values()) == 2312 and counts["pairs"] > 2290, counts


def test_the_publishers_file_of_summaries(tokenizer):
    path = DATA / "summarize_from_feedback" / "comparisons" / "batch9.json"
    if not path.is_file():
        pytest.skip("needs summarize_from_feedback of ../shared/data")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        pair = pairs.from_summaries(row)
        assert pair.chosen == row["summaries"][row["choice"]]["text"].strip()
        assert pair.prompt.messages[0].content.startswith(f"SUBREDDIT: r/{row['info']['subreddit']}\n\nTITLE: ")


@pytest.mark.parametrize("answer", [None, "42", 42])
def test_a_prompt_ends_where_the_assistant_begins(tokenizer, answer):
    row = {"prompt": "6 * 7?"} | ({} if answer is None else {"answer": answer})
    encoded = QueryRows(system="S").encode(row, tokenizer)
    prompt = chatml.encode_prompt(tokenizer, [{"role": "user", "content": "6 * 7?"}], "S")
    reference = [] if answer is None else list(b"42")
    assert encoded.tokens.tolist() == prompt + reference
    assert encoded.loss_weights.tolist() == [1] * len(prompt) + [0] * len(reference)
    assert encoded.segment_lengths.tolist() == [len(prompt), *([len(reference)] if reference else [])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "empty turn of the user"),
        ({"messages": []}, "a prompt that does not end with the user"),
        ({"messages": [USER, _said("a")]}, "a prompt that does not end with the user"),
        ({"prompt": "Q", "answer": ""}, "empty answer"),
        ({"prompt": "Q", "answer": []}, "expected text or a number in 'answer', found list"),
        ({"question": "Q"}, "expected a field 'prompt' or 'messages', found question"),
    ],
)
def test_what_is_no_prompt_is_named(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        QueryRows().encode(row, tokenizer)
