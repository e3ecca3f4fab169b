"""Scores of continuations: those of a forward pass over each text alone, whatever the texts share."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.inference import Engine, logits, scoring
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import random_params

SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=48,
    dtype="float32",
)


def model_of(**changes):
    model = Qwen(ModelConfig(**SIZES | changes))
    return model, random_params(model.config, 0.2)


@pytest.fixture(scope="module")
def loaded():
    return model_of(context_length=128)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Steps so small that these prompts fill several, and are entered."""
    monkeypatch.setattr(scoring, "CPU_STEP_TOKENS", 32)
    monkeypatch.setattr(scoring, "STEP_UNIT", 16)


def questions(longest=100):
    """(prompts, continuations): of two subjects with examples in common, of one to many tokens, in no order."""
    random = np.random.default_rng(3)

    def some(count):
        return random.integers(0, 300, count).tolist()

    pairs = []
    for examples in (some(longest // 2), some(longest // 3)):
        for length in (3, 20, 9):
            prompt = examples + some(length)
            pairs += [(prompt, some(count)) for count in (1, 1, 1, 4, 7)]
    pairs += [(some(1), some(longest - 2)), (some(longest - 8), some(8)), (some(5), some(2)), pairs[7]]
    order = random.permutation(len(pairs))
    return zip(*[pairs[index] for index in order], strict=True)


def all_log_probs(model, params, text):
    """[tokens, vocabulary] after each token, by a forward pass over this text alone."""
    padded = jnp.asarray([[*text, *[0] * (256 - len(text))]])
    found = np.asarray(logits(model, params, padded, jnp.asarray([len(text)])))[0, : len(text)]
    shifted = found - found.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain(model, params, prompt, continuation):
    """(log-probabilities, most likely) by a forward pass over this text alone."""
    found = all_log_probs(model, params, [*prompt, *continuation[:-1]])[len(prompt) - 1 :]
    return found[np.arange(len(continuation)), continuation], found.argmax(-1) == np.asarray(continuation)


def assert_plain(model, params, engine, prompts, continuations):
    prompts, continuations = list(prompts), list(continuations)
    scores = engine.score(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        log_probs, most_likely = plain(model, params, prompt, continuation)
        assert score.log_probs.shape == (len(continuation),) and score.log_probs.dtype == np.float32
        np.testing.assert_allclose(score.log_probs, log_probs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score.most_likely, most_likely)


def test_scores_do_not_depend_on_what_the_texts_share(loaded):
    assert_plain(*loaded, Engine(*loaded), *questions())


@pytest.mark.parametrize(
    "changes",
    [
        dict(context_length=32, use_dynamic_ntk=True, use_logn=True),
        dict(context_length=128, window_sizes=(5, 0)),
    ],
    ids=["ntk and logn", "windows"],
)
def test_context_extension_acts_as_in_a_text_alone(changes):
    """Past the training length, equal prefixes of texts of other lengths have other keys."""
    loaded = model_of(**changes)
    assert_plain(*loaded, Engine(*loaded), *questions(120))


def test_a_mesh_gives_the_scores_of_one_device(loaded):
    prompts, continuations = map(list, questions())
    alone = Engine(*loaded).score(prompts, continuations)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = Engine(*loaded, mesh=mesh).score(prompts, continuations)
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_the_most_probable_tokens_are_told_in_each_place(loaded, mesh):
    prompts, continuations = map(list, questions())
    engine = Engine(*loaded, mesh=mesh and make_mesh(mesh))
    ranked = engine.score(prompts, continuations, top_log_probs=3)
    assert not engine.score(prompts[:1], continuations[:1])[0].top_log_probs
    for prompt, continuation, score, expected in zip(
        prompts, continuations, ranked, engine.score(prompts, continuations), strict=True
    ):
        np.testing.assert_allclose(score.log_probs, expected.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score.most_likely, expected.most_likely)
        rows = all_log_probs(*loaded, [*prompt, *continuation])[len(prompt) - 1 : -1]
        for token, log_prob, likely, top, row in zip(
            continuation, score.log_probs, score.most_likely, score.top_log_probs, rows, strict=True
        ):
            assert [one for one, _ in top] == np.argsort(-row, kind="stable")[:3].tolist()
            np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:3], rtol=0, atol=1e-5)
            assert dict(top).get(token, log_prob) == log_prob and likely == (token == top[0][0])


@pytest.mark.parametrize("number", [-1, 21, 2.0, None])
def test_a_number_of_alternatives_that_is_none_is_refused(loaded, number):
    with pytest.raises(ValueError, match=f"top_log_probs must be an integer from 0 to 20, found {number}"):
        Engine(*loaded).score([[1]], [[2]], top_log_probs=number)


def test_questions_with_the_same_examples_take_few_steps_and_programs(loaded, monkeypatch):
    computed = []
    monkeypatch.setattr(scoring, "CPU_STEP_TOKENS", 64)
    made = scoring.ScoringStep

    def counted(tokens, *others):
        computed.append(tokens.size)
        return made(tokens, *others)

    monkeypatch.setattr(scoring, "ScoringStep", counted)
    engine = Engine(*loaded)
    prompts = [[5] * 100 + [question, 7] for question in range(40) for _ in "ABCD"]
    engine.score(prompts, [[answer] for _ in range(40) for answer in (1, 2, 3, 4)])
    assert sum(computed) <= 100 + 40 * 2 + 3 * 64 and engine.compilations <= 6


def test_no_pairs_have_no_scores(loaded):
    assert Engine(*loaded).score([], []) == []
