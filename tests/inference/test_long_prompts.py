"""Prompts that are computed in chunks: the tokens of whole ones, in memory for the cache and one chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qwen_jax.inference import Engine, Request, SamplingConfig, forward, long_prompts, programs
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh

CHUNK, NEW, LONGEST = 64, 4, 208
PENALIZED = SamplingConfig(repetition_penalty=1.3)
RANDOM = np.random.default_rng(3)


def model_of(**changes):
    """A random model whose greedy choices differ."""
    sizes = dict(vocab_size=96, hidden_size=16, num_layers=2, num_heads=2, head_dim=8, ffn_size=24, context_length=256)
    model = Qwen(ModelConfig(**{**sizes, "dtype": "float32", **changes}))
    shapes = nn.meta.unbox(jax.eval_shape(model.init_params, jax.random.key(0)))
    random = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) / 2, shapes)


@pytest.fixture(scope="module")
def loaded():
    return model_of()


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(*loaded, slots=4, prefill_chunk=CHUNK, prefix_cache_tokens=2048)


def text(length):
    return RANDOM.integers(0, 96, length).tolist()


def results_of(engine, requests):
    return sorted(engine.generate(requests), key=lambda result: result.index)


def assert_whole(loaded, results):
    """The tokens and log-probabilities of one pass over each whole text, greedy with the repetition penalty."""
    tokens = np.zeros((8, LONGEST), np.int32)
    lengths = np.ones(8, np.int32)
    for row, result in enumerate(results):
        ids = [*result.request.prompt, *result.tokens]
        tokens[row, : len(ids)] = ids
        lengths[row] = len(result.request.prompt)  # decoding keeps the alpha of the prompt
    logits = np.asarray(forward.logits(*loaded, tokens, lengths))
    for row, result in enumerate(results):
        length, penalty = lengths[row], result.request.sampling.repetition_penalty
        own = logits[row, length - 1 :][: len(result.tokens)]
        log_probs = jax.nn.log_softmax(own)[np.arange(len(own)), np.asarray(result.tokens)]
        np.testing.assert_allclose(result.log_probs, log_probs, atol=2e-5)
        for number, (token, scores) in enumerate(zip(result.tokens, own, strict=True)):
            seen = np.unique(tokens[row, : length + number])
            scores = scores.copy()
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
            assert token == scores.argmax()


def mixed_requests():
    """Prompts on both sides of one chunk and of several; one is asked for three times."""
    lengths = (CHUNK, CHUNK + 1, 2 * CHUNK, LONGEST - NEW)
    requests = [Request(text(length), NEW, PENALIZED) for length in lengths]
    return [*requests, *[requests[-1]] * 2]


def test_chunks_give_the_tokens_of_whole_prompts(loaded, engine):
    requests = mixed_requests()
    results = results_of(engine, requests)
    assert_whole(loaded, results)
    assert len({token for result in results for token in result.tokens}) > 4
    again = results_of(engine, requests)
    assert_whole(loaded, again)
    # Whole blocks, without the last token; who asks for the same prompt computes nothing.
    assert [result.cached_tokens for result in again[1:4]] == [64, 112, 192]
    further = [Request([*one.request.prompt[:190], *one.tokens, 7, 7], NEW, PENALIZED) for one in results[2:4]]
    found = results_of(engine, further)
    assert_whole(loaded, found)
    assert [result.cached_tokens for result in found] == [128, 176]


def test_any_mesh_gives_the_same(loaded):
    sharded = Engine(*loaded, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]), prefill_chunk=CHUNK)
    assert_whole(loaded, results_of(sharded, mixed_requests()))


def test_with_a_context_that_is_extended():
    """Dynamic NTK goes by the length of the whole prompt, LogN and windows by the position."""
    loaded = model_of(context_length=64, use_dynamic_ntk=True, use_logn=True, window_sizes=(24, 0))
    engine = Engine(*loaded, slots=2, prefill_chunk=CHUNK, prefix_cache_tokens=1024)
    shared = text(LONGEST)
    requests = [Request(shared[:length], NEW) for length in (60, 100, 200)]
    assert_whole(loaded, results_of(engine, requests))
    (again,) = engine.generate([Request([*shared[:180], 1, 2], NEW)])
    assert_whole(loaded, [again])
    assert again.cached_tokens == 176  # of the one with the same alpha


def test_embeddings_stand_for_tokens_in_any_chunk(loaded, engine):
    table = loaded[1]["token_embedding"]
    ids = np.asarray(text(150))
    requests = [
        Request(ids.tolist(), NEW),
        Request(embeddings=table[ids], max_new_tokens=NEW),
        Request([0] * 70 + ids[70:].tolist(), NEW, embeddings=table[ids[:70]], embedding_positions=range(70)),
    ]
    expected, *found = results_of(engine, requests)
    for one in found:
        assert one.tokens == expected.tokens
        np.testing.assert_allclose(one.log_probs, expected.log_probs, atol=2e-5)


def test_others_go_on_between_the_chunks(loaded, engine):
    short = engine.submit(Request(text(3), 40))
    engine.step()
    long = engine.submit(Request(text(LONGEST - NEW), NEW))
    rounds = []
    while engine.live:
        rounds.append([(chunk.handle, len(chunk.tokens)) for chunk in engine.step()])
    # Four chunks; the other request has eight new tokens after each, until it ends.
    first = next(number for number, chunks in enumerate(rounds) if long in dict(chunks))
    assert first == 3 and rounds[0] in ([(short, 7)], [(short, 8)])


def test_a_request_may_be_cancelled_while_its_prompt_is_computed(loaded, engine):
    """The prompt that two requests share is computed in the row of the first; the second takes it over."""
    requests = [Request(text(LONGEST - NEW), NEW)] * 2 + [Request(text(100), NEW), Request(text(120), NEW)]
    first, second, third, never = (engine.submit(request) for request in requests)
    assert engine.step() == []
    assert engine.cancel(first) and engine.cancel(never)
    late = engine.submit(Request([5, 6], NEW))
    chunks = []
    while engine.live:
        chunks += engine.step()
    results = {chunk.handle: chunk.result for chunk in chunks if chunk.result}
    assert set(results) == {second, third, late}
    assert_whole(loaded, list(results.values()))
    handle = engine.submit(requests[0])
    engine.clear_prefix_cache()
    assert engine.step() == []
    assert engine.cancel(handle) and engine.live == 0 and engine.step() == []


def test_who_watches_gets_the_first_token_of_a_long_prompt_at_once(engine):
    stream = engine.stream(Request(text(150), NEW))
    assert len(next(stream).tokens) == 1 and sum(len(chunk.tokens) for chunk in stream) == NEW - 1


def test_lengths_of_long_prompts_compile_nothing(engine, caplog):
    with caplog.at_level("INFO", "qwen_jax.inference"):
        for length in (65, 150, 66, 100, 126, 129, 177, 193):
            list(engine.generate([Request(text(length), 2)]))
    compiled = [record.getMessage() for record in caplog.records]
    # For 128 and 256 slots, if no test before had them.
    assert sum(message.startswith(("compiled extend", "compiled begin")) for message in compiled) <= 4


def temporaries(program, *arguments):
    memory = program.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.alias_size_in_bytes


@pytest.mark.parametrize("axes", [None, dict(data=2, tensor=2)], ids=["one device", "a mesh"])
def test_a_long_prompt_takes_the_cache_and_one_chunk(loaded, axes):
    """The compiled programs update the cache in place; what else they need is the same for 2,048 and 32,768 slots."""
    config = loaded[0].config
    mesh = None if axes is None else make_mesh(MeshConfig(**axes), jax.devices()[:4])
    rows, parts = (1, 1) if mesh is None else (2, 4)
    params = Engine(*loaded, mesh=mesh).params
    tokens, ids = np.zeros((rows, 256), np.int32), np.arange(rows, dtype=np.int32)
    seen, blocks = np.zeros((rows, config.vocab_size), bool), np.zeros((rows, 32768 // 16), np.int32)
    pool = programs.empty_pool(mesh, config, 64)
    found = {}
    for slots in (2048, 32768):
        state = programs.empty_state(mesh, config, rows, slots)
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers)) // parts
        found[slots] = [
            temporaries(long_prompts.extend, mesh, config, params, state, tokens, ids, ids, ids),
            temporaries(long_prompts.paste, mesh, state, pool, ids, blocks[:, : slots // 16], ids),
            temporaries(long_prompts.begin, mesh, state, ids, ids, seen, ids, ids),
        ]
        assert all(aliased >= cache for _, aliased in found[slots])
    assert cache >= 2 << 20
    for (small, _), (large, _) in zip(*found.values(), strict=True):
        assert large <= small + 64 * 1024


def test_scores_of_long_texts_take_the_cache_and_one_step(loaded):
    config, params = loaded[0].config, Engine(*loaded).params
    sizes = [(1, 256)] * 3 + [(1,)] + [(1, 16)] * 2
    step = programs.ScoringStep(*(jnp.zeros(size, jnp.int32) for size in sizes))
    small, large = (
        temporaries(programs.score, None, config, params, programs.empty_cache(None, config, 1, slots), step)
        for slots in (2048, 32768)
    )
    assert large[0] <= small[0] + 64 * 1024 and large[1] - small[1] == 30720 * 16 * 2 * 4 * 2


@pytest.mark.parametrize("chunk", [0, 8, 100, 64.0])
def test_a_chunk_that_cannot_be_is_refused(loaded, chunk):
    with pytest.raises(ValueError, match="prefill_chunk must be a power of two of at least 16 tokens"):
        Engine(*loaded, prefill_chunk=chunk)
