"""Learning merges: the same as the trainer of `tokenizers`, and on top of a base what that trainer cannot be asked."""

import json
from fractions import Fraction

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from qwen_jax.conversion.tokenizer import tokenizer_json
from qwen_jax.data.byte_pairs import PieceCounts, byte_ranks, learn_merges, without_numbers
from qwen_jax.data.tokenizer import CONTROL_TOKENS, PATTERN, Tokenizer, read_ranks, released_ranks_path, write_ranks

WORDS = st.text(st.sampled_from("aabc 你好é.\n1"), max_size=30)
CHINESE = "通义千问是阿里云研发的大模型。"
MULTILINGUAL = st.text(st.sampled_from(CHINESE + "สวัสดีชาวโลก 12e\u0301é<|im_end|>\n"), max_size=60)
TEXTS = st.lists(WORDS, min_size=1, max_size=12)


def _counts(*corpora: tuple[list[str], Fraction | int]) -> PieceCounts:
    counts = PieceCounts()
    for texts, weight in corpora:
        counts.add(texts, weight)
    return counts


def _learn(texts: list[str], num_merges: int, base=None, **options) -> dict[bytes, int]:
    return learn_merges(_counts((texts, 1)), byte_ranks() if base is None else base, num_merges, **options)


def _by_tokenizers(texts: list[str], num_merges: int, min_frequency: int) -> list[str]:
    """Tokens, in the order of rank, of the trainer of `tokenizers`."""
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        min_frequency=min_frequency,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return [token for token, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])]


def _written(ranks: dict[bytes, int], tmp_path) -> list[str]:
    """Tokens in byte-level characters, in the order of rank."""
    write_ranks(ranks, tmp_path / "v.tiktoken")
    vocabulary = tokenizer_json(Tokenizer(tmp_path / "v.tiktoken"))["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__)


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, num_merges=st.integers(0, 40), min_count=st.integers(1, 3))
def test_same_merges_as_the_trainer_of_tokenizers(tmp_path_factory, texts, num_merges, min_count):
    """Ties, overlapping pairs and running out of pairs included."""
    ours = _learn(texts, num_merges, min_count=min_count)
    assert _written(ours, tmp_path_factory.mktemp("v")) == _by_tokenizers(texts, num_merges, min_count)


def test_same_merges_on_real_text(root, tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "qwen_jax").rglob("*.py"))]
    assert _written(_learn(texts, 3000), tmp_path) == _by_tokenizers(texts, 3000, 2)


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS, first=st.integers(0, 20), then=st.integers(0, 20))
def test_going_on_from_a_base_is_going_on(texts, first, then):
    """Learning, writing the vocabulary and learning on from it is one learning."""
    base = _learn(texts, first)
    on = _learn(texts, then, base)
    assert list(on)[: len(base)] == list(base)
    assert on == _learn(texts, first + then if len(base) == 256 + first else first)


@settings(max_examples=60, deadline=None)
@given(one=TEXTS, two=TEXTS, weight=st.integers(1, 4), parts=st.integers(1, 3))
def test_a_weight_counts_text_so_many_times(one, two, weight, parts):
    weighted = learn_merges(_counts((one, Fraction(weight, parts)), (two, 1)), byte_ranks(), 30, min_count=1)
    repeated = learn_merges(_counts((one * weight, 1), (two * parts, 1)), byte_ranks(), 30, min_count=parts)
    assert weighted == repeated


def test_a_pair_must_be_common_enough():
    assert list(_learn(["abab cd"], 10))[256:] == [b"ab"]
    assert len(_learn(["abab cd"], 10, min_count=3)) == 256
    assert _learn([], 10) == byte_ranks() == _learn(["", "a 1"], 10)


def test_a_weight_must_be_positive():
    with pytest.raises(ValueError, match="weight of a corpus is 0: it must be positive"):
        _counts((["a"], 0))


def test_bytes_come_in_the_order_of_the_released_vocabulary():
    released = read_ranks(released_ranks_path())
    assert list(byte_ranks()) == sorted(released, key=released.__getitem__)[:256]


@settings(deadline=None)
@given(places=st.lists(st.integers(0, 300), max_size=20), data=st.data())
def test_tokens_of_several_digits_leave_the_base(places, data):
    """cl100k_base is the first 99,156 released ranks with numbers among them; any vocabulary with numbers will do."""
    clean = [*byte_ranks(), *(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}".encode() for i in range(100)), b" 1", b"x2"]
    numbers = data.draw(
        st.lists(st.from_regex(r"[0-9]{2,3}", fullmatch=True), min_size=len(places), max_size=len(places), unique=True)
    )
    tokens = list(clean)
    for place, number in zip(places, numbers, strict=True):
        tokens.insert(place, number.encode())
    assert without_numbers({token: rank for rank, token in enumerate(tokens)}) == {t: r for r, t in enumerate(clean)}


@pytest.fixture(scope="module")
def on_released(tmp_path_factory):
    """The shape of the released vocabulary: 99,156 ranks of cl100k_base without numbers, then merges learned here."""
    released = read_ranks(released_ranks_path())
    base = without_numbers({token: rank for token, rank in released.items() if rank < 99_156})
    texts = [f"{CHINESE}词表在此之上增加了常见的汉字和词。" * 3, "สวัสดีชาวโลก ภาษาไทย " * 4, "2023 12 café\n"] * 2
    path = tmp_path_factory.mktemp("shape") / "v.tiktoken"
    write_ranks(base, path)
    before = Tokenizer(path)
    write_ranks(learn_merges(_counts((texts, 2)), base, 40), path)
    tokenizer = Tokenizer(path)
    return tokenizer, tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer))), before


def test_the_shape_of_the_released_vocabulary(on_released):
    tokenizer, _, before = on_released
    assert tokenizer.num_ranks == 99_156 + 40 and tokenizer.vocab_size == 99_156 + 40 + len(CONTROL_TOKENS)
    released = Tokenizer().mergeable_ranks
    assert list(before.mergeable_ranks.items()) == sorted(released.items(), key=lambda item: item[1])[:99_156]
    assert before.mergeable_ranks.items() <= tokenizer.mergeable_ranks.items()
    assert len(tokenizer.encode(CHINESE)) < len(before.encode(CHINESE))
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE
    assert [tokenizer.decode([token]) for token in tokenizer.encode("20231")] == list("20231")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60) | MULTILINGUAL.map(str.encode))
def test_every_byte_string_round_trips(on_released, data):
    tokenizer = on_released[0]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(max_examples=200, deadline=None)
@given(text=MULTILINGUAL | st.text(max_size=40))
def test_tiktoken_and_tokenizers_give_the_same_ids(on_released, text):
    assume("<|" not in text)  # `tokenizers` reads the names of control tokens in any text
    tokenizer, converted, _ = on_released
    assert converted.encode(text).ids == tokenizer.encode(text)


def test_a_base_that_byte_pairs_did_not_make_is_refused():
    """`abc` cannot be reached in it, so a merge that makes it would get its rank, not a new one."""
    base = byte_ranks() | {b"abc": 256}
    with pytest.raises(ValueError, match=r"the base has b'abc' but encodes it as b'ab' \+ b'c'"):
        _learn(["abcw abcx abcy abcz"], 5, base)
