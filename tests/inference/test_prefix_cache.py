"""The prefix cache: the same tokens as without it, and beginnings that requests have in common computed once."""

from collections import deque

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.conversion import load_pretrained
from qwen_jax.inference import Engine, Request, SamplingConfig, programs
from qwen_jax.inference.admission import next_prompts, prefill_count, prompts_of_rows
from qwen_jax.inference.prefix_cache import PrefixIndex
from qwen_jax.inference.programs import BLOCK_TOKENS
from qwen_jax.inference.requests import Handle
from qwen_jax.inference.row import Row
from tests.fakes import random_run

SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95)
RANDOM = np.random.default_rng(5)
SYSTEM = RANDOM.integers(0, 256, 75).tolist()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random model over single bytes."""
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=256)
    return load_pretrained(random_run(tmp_path_factory.mktemp("prefixes"), **sizes))


@pytest.fixture(scope="module")
def plain(loaded):
    return Engine(*loaded, slots=4)


@pytest.fixture
def computed(monkeypatch):
    """(prompts, tokens of each) of every call of the program that computes prompts, with padding."""
    calls, prefill = [], programs.prefill

    def record(mesh, config, params, tokens, *rest):
        calls.append(tokens.shape)
        return prefill(mesh, config, params, tokens, *rest)

    monkeypatch.setattr(programs, "prefill", record)
    return calls


def results_of(engine, requests):
    return sorted(engine.generate(requests), key=lambda result: result.index)


def assert_same(found, expected):
    assert [result.tokens for result in found] == [result.tokens for result in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
        np.testing.assert_allclose(one.behavior_log_probs, other.behavior_log_probs, atol=1e-4)


# Texts of two letters, which often begin alike, in blocks of one letter: long enough for several blocks.
TEXTS = st.lists(st.sampled_from("ab"), max_size=5).map(
    lambda letters: tuple(ord(letter) for letter in letters for _ in range(BLOCK_TOKENS)) + (0,)
)


@hypothesis.given(
    capacity=st.integers(1, 6), steps=st.lists(st.tuples(st.booleans(), st.sampled_from([1.0, 3.0]), TEXTS))
)
def test_a_place_holds_what_the_index_says(capacity, steps):
    index, pool = PrefixIndex(capacity), {}
    for adding, root, text in steps:
        if adding:
            before = set(index.find(root, text))
            added = index.add(root, text)
            assert not before & {place for _, place in added}
            for block, place in added:
                pool[place] = (root, text[: (block + 1) * BLOCK_TOKENS])
            blocks = len(text) // BLOCK_TOKENS
            assert len(index.find(root, text)) == min(blocks, capacity)
        found = index.find(root, text)
        assert len(index) <= capacity and all(0 <= place < capacity for place in found)
        for block, place in enumerate(found):
            assert pool[place] == (root, text[: (block + 1) * BLOCK_TOKENS])


def test_what_was_used_longest_ago_makes_room_from_its_end():
    index = PrefixIndex(3)
    first, second = [1] * 2 * BLOCK_TOKENS, [2] * BLOCK_TOKENS
    assert [block for block, _ in index.add(0, first)] == [0, 1]
    index.add(0, second)
    index.find(0, first)
    index.add(0, [3] * BLOCK_TOKENS)
    assert len(index.find(0, first)) == 2 and index.find(0, second) == []
    index.add(0, [4] * BLOCK_TOKENS)
    index.add(0, [5] * BLOCK_TOKENS)
    assert len(index.find(0, first)) == 1


@pytest.mark.parametrize("tokens", [1024, 48])
def test_tokens_are_those_without_it(loaded, plain, tokens):
    """Prompts with a common beginning, and conversations that go on; a pool that is too small, too."""
    engine = Engine(*loaded, slots=4, prefix_cache_tokens=tokens)
    rules = SAMPLED, SamplingConfig(repetition_penalty=1.2)
    requests = [Request(SYSTEM + [i] * (1 + 7 * i), 20 + i, rules[i % 2], seed=i) for i in range(6)]
    requests += [Request([i] * (3 + i), 9, rules[i % 2], seed=i) for i in range(3)]
    expected = results_of(plain, requests)
    assert_same(results_of(engine, requests), expected)
    again = results_of(engine, requests)
    assert_same(again, expected)
    if tokens == 1024:
        assert [result.cached_tokens for result in again] == [64, 80, 80, 96, 96, 96, 0, 0, 0]
    further = [Request([*one.request.prompt, *one.tokens, 9, 9], 12, rules[0], seed=one.index) for one in expected[:6]]
    assert_same(results_of(engine, further), results_of(plain, further))


def test_a_reply_is_part_of_the_next_prompt(loaded, plain, computed):
    engine = Engine(*loaded, slots=2, prefix_cache_tokens=512)
    (first,) = engine.generate([Request(SYSTEM[:40], 90)])
    following = Request([*first.request.prompt, *first.tokens, *range(5)], 8)
    (second,) = engine.generate([following])
    # The last token of the reply was never read, and blocks are whole.
    assert second.cached_tokens == (40 + 90 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert computed == [(1, 64), (1, 16)]
    assert_same([second], list(plain.generate([following])))


def test_those_who_come_together_wait_for_the_one_that_begins_as_they_do(loaded, computed):
    engine = Engine(*loaded, slots=8, prefix_cache_tokens=512)
    results = results_of(engine, [Request(SYSTEM + [i], 3) for i in range(4)] + [Request([7] * 100, 3)])
    assert [result.cached_tokens for result in results] == [0, 64, 64, 64, 0]
    assert sorted(computed) == [(1, 128), (1, 128), (4, 16)]


def test_several_samples_of_a_prompt_compute_it_once(loaded, plain, computed):
    requests = [Request(prompt, 12, SAMPLED, seed=seed) for prompt in (SYSTEM, [1, 2, 3]) for seed in range(5)]
    results = results_of(Engine(*loaded, slots=16), requests)
    assert sorted(computed) == [(1, 16), (1, 128)]
    assert [result.cached_tokens for result in results] == [0, 75, 75, 75, 75, 0, 3, 3, 3, 3]
    alone = [next(plain.generate([request])) for request in requests]
    assert_same(results, alone)
    assert len({result.tokens for result in results}) > 6


def test_with_a_context_that_is_extended(tmp_path):
    """Keys depend on the length of the prompt with dynamic NTK, and queries on their position with LogN."""
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=64)
    extension = dict(use_dynamic_ntk=True, use_logn=True, window_sizes=(24, 0))
    model, params = load_pretrained(random_run(tmp_path, **sizes, **extension))
    text = RANDOM.integers(0, 256, 300).tolist()
    # Two below the training length, two of one alpha, two of the next.
    requests = [Request(text[:length], 10, seed=length) for length in (50, 60, 90, 110, 140, 240)]
    expected = results_of(Engine(model, params, slots=2), requests)
    engine = Engine(model, params, slots=2, prefix_cache_tokens=1024)
    found = [next(engine.generate([request])) for request in requests]
    assert_same(found, expected)
    assert [result.cached_tokens for result in found] == [0, 48, 0, 80, 0, 128]


def test_new_weights_empty_it_and_rows_under_way_are_not_kept(loaded):
    model, params = loaded
    other = {**params, "token_embedding": params["token_embedding"][::-1]}
    engine = Engine(model, params, slots=2, prefix_cache_tokens=512)
    list(engine.generate([Request(SYSTEM, 4)]))
    engine.submit(Request(SYSTEM, 40), streaming=True)
    engine.step()
    engine.set_params(other)
    while engine.live:
        engine.step()
    request = Request(SYSTEM + [1, 2], 20)
    (found,) = engine.generate([request])
    assert found.cached_tokens == 0
    assert_same([found], list(Engine(model, other, slots=1).generate([request])))


def test_embeddings_are_not_shared(loaded):
    engine = Engine(*loaded, slots=2, prefix_cache_tokens=512)
    embeddings = RANDOM.standard_normal((1, 32)).astype(np.float32)
    request = Request(SYSTEM, 10, embeddings=embeddings, embedding_positions=[3])
    first, second = (next(engine.generate([one])) for one in (Request(SYSTEM, 10), request))
    again = next(engine.generate([request]))
    assert np.abs(first.log_probs - second.log_probs).max() > 1e-2
    assert second.tokens == again.tokens and again.cached_tokens == 0


def test_sizes_that_cannot_be_are_refused(loaded):
    for wrong in (-1, 15, 0.5):
        with pytest.raises(ValueError, match="prefix_cache_tokens must be 0 .* or at least 16"):
            Engine(*loaded, prefix_cache_tokens=wrong)


def test_one_prompt_of_very_many_requests_is_split():
    rows = [Row(Handle(i, Request((1, 2 + i // 18))), None, False, deque()) for i in range(20)]
    assert [len(prompt.rows) for prompt in prompts_of_rows(rows, 1)] == [16, 2, 2]
    (first,) = next_prompts(prompts_of_rows(rows, 1), None, 1)
    assert first.rows == rows[:16]


def test_few_prompts_are_not_padded_to_many():
    assert [prefill_count(prompts, 64, 1) for prompts in (1, 2, 3, 4, 5, 8, 11, 12, 16, 40)] == [
        *(1, 1, 4, 4, 4, 4, 4, 16, 16, 16)
    ]
    assert prefill_count(40, 1024, 1) == 4 and prefill_count(1, 8192, 4) == 4
