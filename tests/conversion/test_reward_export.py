"""Reward models as Qwen2ForSequenceClassification: scores equal ours, padded on either side, with its template."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.conversion.check import compare_logits
from qwen_jax.conversion.initial_weights import InitialWeights
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.chatml import encode_conversation
from qwen_jax.models.config import ModelConfig
from tests.fakes import outputs_of_row

CONFIG = ModelConfig(
    vocab_size=600,
    hidden_size=48,
    num_layers=2,
    num_heads=3,
    head_dim=16,
    ffn_size=40,
    context_length=256,
    head="scalar",
)
CONVERSATIONS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi <|endoftext|> there"},
        {"role": "assistant", "content": "hello, and a longer answer than that of the other one"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "bye"},
    ],
]


@pytest.fixture
def reward_run(tmp_path, random_params, tokenizer_file):
    save_params(tmp_path / "run", CONFIG, random_params(CONFIG), str(tokenizer_file))
    return tmp_path / "run"


@pytest.fixture
def exported(reward_run, tmp_path):
    return convert("orbax", reward_run, "qwen2_reward", tmp_path / "reward", progress=False, verify=True)


def our_rewards(folder):
    model, params = load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    found = []
    for messages in CONVERSATIONS:
        ids = encode_conversation(tokenizer, messages)
        assert ids[-1] == tokenizer.im_end_id
        found.append(float(outputs_of_row(model, params, ids, 256, method="scalars")[-1]))
    return found


def test_the_exported_folder_says_what_transformers_needs(exported):
    content = json.loads((exported / "config.json").read_text())
    tokenizer = load_tokenizer(exported)
    assert content["architectures"] == ["Qwen2ForSequenceClassification"]
    assert content["pad_token_id"] == tokenizer.endoftext_id != tokenizer.im_end_id
    assert list(content["id2label"].values()) == ["reward"] and content["problem_type"] == "regression"
    assert not (exported / "generation_config.json").exists()
    tensors = load_file(exported / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 48) and "score.bias" not in tensors and "lm_head.weight" not in tensors


def test_transformers_gives_our_rewards_for_batches_padded_on_either_side(reward_run, exported):
    """Rendered by apply_chat_template; without cutting the last line end the score is another."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype="float32").eval()
    assert type(model).__name__ == "Qwen2ForSequenceClassification" and model.config.num_labels == 1
    assert model.score.bias is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CONVERSATIONS]
    expected = our_rewards(reward_run)

    def scores(texts, side):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            return model(**batch).logits[:, 0].numpy()

    # Content that names a control token is text for us and a token for this tokenizer: only the first is the same.
    for side in ("left", "right"):
        cut = scores([text.removesuffix("\n") for text in rendered], side)
        assert cut[0] == pytest.approx(expected[0], abs=1e-5)
        whole = scores(rendered, side)
        assert abs(whole[0] - expected[0]) > 1e-3
    plain = [[{**message, "content": message["content"].replace("<|endoftext|> ", "")} for message in CONVERSATIONS[1]]]
    ours = encode_conversation(load_tokenizer(exported), plain[0])
    text = tokenizer.apply_chat_template(plain[0], tokenize=False).removesuffix("\n")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours
    own, params = load_pretrained(exported)
    reward = float(outputs_of_row(own, params, ours, 256, method="scalars")[-1])
    for side in ("left", "right"):
        pair = scores([text, rendered[0].removesuffix("\n")], side)
        np.testing.assert_allclose(pair, [reward, expected[0]], atol=1e-5)


def test_a_model_of_transformers_is_read_and_scores_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="makes a model with transformers")
    transformers = pytest.importorskip("transformers", reason="makes a model with transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=299,
        eos_token_id=298,
        tie_word_embeddings=False,
    )
    theirs = transformers.Qwen2ForSequenceClassification(config).eval().float()
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.config.head == "scalar" and params["score"].shape == (32, 1)
    ids = np.random.default_rng(0).integers(0, 298, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits[:, 0].numpy()
    found = jax.jit(lambda p, ids: model.apply({"params": p}, ids, method="scalars"))(params, ids)[:, -1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_back_and_forth_changes_no_number(reward_run, exported, tmp_path):
    back = convert("qwen2_reward", exported, "orbax", tmp_path / "back", progress=False)
    first, second = (flatten_dict(load_pretrained(folder)[1], sep="/") for folder in (reward_run, back))
    assert first.keys() == second.keys() == parameter_shapes(CONFIG).keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)
    comparison = compare_logits(reward_run, exported)
    assert comparison.largest == 0 and str(comparison).startswith("scores differ by 0 at most")


def test_what_a_format_cannot_express_is_refused(reward_run, tmp_path, random_params, exported):
    for target in ("qwen", "qwen2", "gguf"):
        with pytest.raises(ValueError, match="cannot express a model with the head 'scalar'"):
            convert("orbax", reward_run, target, tmp_path / f"as_{target}", progress=False)
    language = ModelConfig(**{**CONFIG.to_dict(), "head": "tokens"})
    save_params(tmp_path / "language", language, random_params(language), None)
    with pytest.raises(ValueError, match="cannot express a model with the head 'tokens'"):
        convert("orbax", tmp_path / "language", "qwen2_reward", tmp_path / "wrong", progress=False)
    save_params(tmp_path / "bare", CONFIG, random_params(CONFIG), None)
    with pytest.raises(ValueError, match="needs the id of the pad token, and .*bare has no tokenizer"):
        convert("orbax", tmp_path / "bare", "qwen2_reward", tmp_path / "wrong", progress=False)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_logits(reward_run, tmp_path / "language")
    content = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(content | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match=r"2 labels \(id2label\), supported is 1"):
        load_pretrained(exported)


def test_a_reward_model_starts_from_a_base_model_and_not_from_all_of_it(tmp_path, random_params):
    language = ModelConfig(**{**CONFIG.to_dict(), "head": "tokens"})
    save_params(tmp_path / "language", language, random_params(language), None)
    shapes = parameter_shapes(CONFIG)
    abstract = unflatten_dict({path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()}, sep="/")
    InitialWeights(tmp_path / "language", ["token_embedding", "layers", "final_norm"], CONFIG).check(abstract)
    with pytest.raises(ValueError, match=r"score \[48, 1\] is not there.*take a part of the weights"):
        InitialWeights(tmp_path / "language", None, CONFIG).check(abstract)
