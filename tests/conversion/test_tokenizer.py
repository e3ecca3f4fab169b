"""Converted tokenizers give tiktoken's ids, in `tokenizers` and in transformers' AutoTokenizer."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwen_jax.conversion.tokenizer import (
    CHAT_TEMPLATE,
    TRAINING_TEMPLATE,
    recover_ranks,
    tokenizer_config,
    tokenizer_json,
    write_tokenizer,
)
from qwen_jax.data.chat import encode
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.conversations import Conversation, Message
from qwen_jax.data.merges import derive_merges
from qwen_jax.data.tokenizer import Tokenizer, write_ranks

MULTILINGUAL = [
    "The Qwen models were trained on 3 trillion tokens, in 2023; isn't that MANY? They'LL say so.",
    "通义千问是阿里云研发的大规模语言模型。它支持中文、英文等多种语言！",
    "Être ou ne pas être; cafe\u0301 becomes café — Straße, naïve, größer",
    "Привет, как дела? Всё хорошо. ქართული Ελληνικά",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "こんにちは世界。カタカナもあります。 안녕하세요 \u1112\u1161\u11ab글",
    "สวัสดีชาวโลก हिन्दी भाषा Tiếng Việt rất hay",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif x:\r\n\t\tpass   \n",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and e\u0301\u0323 marks \u00a0\u3000 spaces",
    "1234567890 3.14159 ½ ² Ⅷ ٣٤٥",
    "                                  aligned\n\n\n\n\n\n",
    "",
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(Tokenizer, folder with the converted files) of the released vocabulary."""
    folder = tmp_path_factory.mktemp("released")
    tokenizer = Tokenizer()
    write_tokenizer(folder, tokenizer, 8192)
    return tokenizer, folder


@pytest.fixture(scope="module")
def pair(tokenizer_file):
    """Our small tokenizer, and the same converted."""
    ours = Tokenizer(tokenizer_file)
    return ours, tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))


def test_a_model_with_an_encoder_brings_the_tokens_of_pictures_and_boxes(tokenizer_file, tmp_path):
    ours = Tokenizer(tokenizer_file)
    write_tokenizer(tmp_path, ours, 64, ours.vision_vocab_size, vision=True)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(ours.vision_tokens) == 9 and {name: theirs.token_to_id(name) for name in ours.vision_tokens} == (
        ours.vision_tokens
    )
    tags = [ours.vision_tokens[name] for name in ("<box>", "</box>")]
    assert theirs.encode("a<box>(1,2)</box>").ids == [*ours.encode("a"), tags[0], *ours.encode("(1,2)"), tags[1]]
    decoder = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert set(map(str, ours.vision_tokens.values())) <= set(decoder)
    # Read back without the file of ranks, which others do not have.
    for file in tmp_path.glob("*.tiktoken"):
        file.unlink()
    (tmp_path / "scratch").mkdir()
    assert Tokenizer(recover_ranks(tmp_path, tmp_path / "scratch")).fingerprint == ours.fingerprint


def test_released_vocabulary_has_the_known_number_of_merges(released):
    content = json.loads((released[1] / "tokenizer.json").read_text())
    assert len(content["model"]["merges"]) == 151_387
    assert len(content["model"]["vocab"]) == 151_643


def test_released_vocabulary_gives_the_same_ids(released):
    tokenizer, folder = released
    converted = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in MULTILINGUAL:
        assert converted.encode(text).ids == tokenizer.encode(text), text
        assert converted.decode(converted.encode(text).ids) == tokenizer.decode(tokenizer.encode(text))
    rng = random.Random(0)
    # Any mixture of scripts, and tokens of the vocabulary put side by side where merges could cross.
    tokens = [t.decode(errors="ignore") for t in rng.sample(sorted(tokenizer.mergeable_ranks), 4000)]
    for start in range(0, 4000, 40):
        text = "".join(tokens[start : start + 40])
        assert converted.encode(text).ids == tokenizer.encode(text), text


ALPHABET = "thequickbrown 世界你好éüß'dstDST1290.,\n\r\t ий\u0301\u1112\u1161\U0001f600<|>_"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=ALPHABET, max_size=80))
def test_same_ids_for_text_of_the_vocabulary(pair, text):
    ours, converted = pair
    assert converted.encode(text).ids == ours.encode(text)


# Characters that this Python does not know yet may be normalized by one library and not by the other.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs", "Cn")), max_size=40))
def test_same_ids_for_any_text(pair, text):
    assume("<|" not in text)  # `tokenizers` makes control tokens of such text, ours never does
    ours, converted = pair
    assert converted.encode(text).ids == ours.encode(text)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpus=st.text("ab c", min_size=20, max_size=200), seed=st.integers(0, 3), text=st.text("abc ", max_size=60))
def test_same_ids_for_any_vocabulary(tmp_path_factory, train_ranks, corpus, seed, text):
    """Few letters give the vocabularies whose merges overlap most."""
    path = tmp_path_factory.mktemp("vocabulary") / "any.tiktoken"
    write_ranks(train_ranks(corpus, 40, seed), path)
    ours = Tokenizer(path)
    converted = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    assert converted.encode(text).ids == ours.encode(text)


def test_a_token_that_no_merge_makes_is_named(tokenizer_file):
    ranks = dict(Tokenizer(tokenizer_file).mergeable_ranks)
    ranks[b"zqx"] = len(ranks)
    with pytest.raises(ValueError, match=r"b'zqx' \(rank \d+, stays b'z' \+ b'q' \+ b'x'\)"):
        derive_merges(ranks)


def test_auto_tokenizer_gives_our_ids_and_the_chatml_text(released):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer, folder = released
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for text in MULTILINGUAL:
        assert auto(text)["input_ids"] == tokenizer.encode(text)
        assert auto.decode(auto(text)["input_ids"]) == tokenizer.decode(tokenizer.encode(text))
    names = tokenizer.control_tokens
    assert auto.convert_tokens_to_ids(list(names)) == list(names.values())
    assert auto("<|im_start|>user\nHi<|im_end|>")["input_ids"] == [151644, 872, 198, 13048, 151645]
    assert len(auto) == tokenizer.vocab_size and auto.model_max_length == 8192
    assert (auto.eos_token, auto.pad_token, auto.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)
    assert auto.decode([151644, 9707, 151645], skip_special_tokens=True) == "Hello"

    turns = [{"role": "user", "content": "Hi  "}, {"role": "assistant", "content": "\nHello"}]
    opening = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    text = opening + "<|im_start|>user\nHi  <|im_end|>\n<|im_start|>assistant\n\nHello<|im_end|>\n"
    assert auto.apply_chat_template(turns, tokenize=False) == text
    prompt = auto.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == opening + "<|im_start|>user\nHi  <|im_end|>\n<|im_start|>assistant\n"
    system = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert auto.apply_chat_template(system, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi  <|im_end|>\n"
    )
    ids = auto.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode_with_control_tokens(prompt)


def test_recovers_the_ranks_from_tokenizer_json(tmp_path, tokenizer_file):
    folder = tmp_path / "converted"
    folder.mkdir()
    write_tokenizer(folder, Tokenizer(tokenizer_file), 32)
    assert recover_ranks(folder, tmp_path) == folder / "qwen.tiktoken"
    (folder / "qwen.tiktoken").unlink()
    assert recover_ranks(folder, tmp_path).read_bytes() == tokenizer_file.read_bytes()
    # What `tokenizers` itself writes, merges as pairs:
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).save(str(folder / "tokenizer.json"))
    assert isinstance(json.loads((folder / "tokenizer.json").read_text())["model"]["merges"][0], list)
    assert recover_ranks(folder, tmp_path).read_bytes() == tokenizer_file.read_bytes()
    assert recover_ranks(tmp_path / "run", tmp_path) is None


def in_two_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes vocab.json and merges.txt as transformers' class in Python does, and no tokenizer.json."""
    content = tokenizer_json(tokenizer)["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(content["merges"]) + "\n", encoding="utf-8")
    added = {str(i): {"content": name} for name, i in list(tokenizer.control_tokens.items())[:3]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_reads_vocab_json_with_merges_txt(tmp_path, tokenizer_file):
    folder = tmp_path / "two"
    in_two_files(folder, Tokenizer(tokenizer_file))
    assert recover_ranks(folder, tmp_path).read_bytes() == tokenizer_file.read_bytes()
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert recover_ranks(folder, tmp_path).read_bytes() == tokenizer_file.read_bytes()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"vocab\.json: text is not normalized and split as Qwen does it"):
        recover_ranks(folder, tmp_path)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a vocab\.json without merges\.txt"):
        recover_ranks(folder, tmp_path)


def control_first(content):
    for token, i in content["model"]["vocab"].items():
        content["model"]["vocab"][token] = i + 208
    for i, entry in enumerate(content["added_tokens"]):
        entry["id"] = i


def hole(content):
    vocabulary = content["model"]["vocab"]
    vocabulary[next(token for token, i in vocabulary.items() if i == 300)] = 9999


def appended(content):
    content["model"]["vocab"]["zqx"] = len(content["model"]["vocab"])
    for entry in content["added_tokens"]:
        entry["id"] += 1


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: content["model"]["merges"].reverse(), "merges are not those of its ranks"),
        (lambda content: content.update(normalizer=None), "normalized"),
        (lambda content: content["model"].update(type="WordPiece"), "WordPiece"),
        (lambda content: content["added_tokens"][2].update(id=7), "<|im_end|> has id 7"),
        (control_first, "control tokens come before those of text (<|endoftext|> has id 0"),
        (hole, "rank 300 is missing"),
        (appended, "b'zqx' (rank"),
    ],
)
def test_refuses_a_tokenizer_that_would_give_other_ids(tmp_path, tokenizer_file, damage, words):
    content = tokenizer_json(Tokenizer(tokenizer_file))
    damage(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        recover_ranks(tmp_path, tmp_path)
    # The file that was given, never one that was made from it.
    assert words in str(caught.value) and str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "qwen.tiktoken" not in str(caught.value)


def test_the_template_for_trl_is_the_same_text_and_marks_what_carries_loss(tmp_path, tokenizer_file):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    tokenizer = Tokenizer(tokenizer_file)
    write_tokenizer(tmp_path, tokenizer, 64)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "over. "},
    ]
    for some in (turns, [{"role": "system", "content": "Be brief."}, *turns[:2]]):
        plain = auto.apply_chat_template(some, tokenize=False)
        assert auto.apply_chat_template(some, tokenize=False, chat_template=TRAINING_TEMPLATE) == plain
        assert "<|im_end|>\n<|im_start|>" in plain and plain.endswith("<|im_end|>\n")
        marked = auto.apply_chat_template(
            some, chat_template=TRAINING_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
        )
        messages = tuple(Message(one["role"], one["content"]) for one in some)
        ours = encode(tokenizer, Conversation(messages), loss_on="report")
        assert marked["input_ids"] == ours.tokens.tolist()
        assert marked["assistant_masks"] == ours.loss_weights.tolist()
    # What a folder carries is read by plain Jinja, as llama.cpp and its like have it; the other is not.
    assert "generation" not in tokenizer_config(tokenizer, 64)["chat_template"].replace("add_generation_prompt", "")
    environment = jinja2.Environment()
    assert environment.from_string(CHAT_TEMPLATE).render(messages=turns) == auto.apply_chat_template(
        turns, tokenize=False
    )
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        environment.from_string(TRAINING_TEMPLATE)
