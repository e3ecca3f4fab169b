"""Requests that come and go: submit, step and cancel, live queues, weights that are shared, embeddings as input."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.inference import Engine, Request, SamplingConfig, batch
from qwen_jax.models.transformer import InputEmbeddings
from tests.fakes import outputs, random_run

SAMPLED = SamplingConfig(temperature=1.0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random model over a vocabulary of single bytes."""
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=128)
    return random_run(tmp_path_factory.mktemp("live"), **sizes)


@pytest.fixture(scope="module")
def loaded(run_folder):
    return load_pretrained(run_folder)


@pytest.fixture(scope="module")
def engine(loaded, run_folder):
    return Engine(*loaded, load_tokenizer(run_folder), slots=4)


def tokens_of(engine, requests):
    results = sorted(engine.generate(requests), key=lambda result: result.index)
    return [result.tokens for result in results]


def until_idle(engine):
    chunks = []
    while engine.live:
        chunks += engine.step()
    return chunks


def test_requests_that_come_at_any_time_get_the_tokens_of_one_call(engine):
    requests = [Request([i, 7, i], 20 + 5 * i, SAMPLED, seed=i) for i in range(6)]
    expected = tokens_of(engine, requests)
    handles, chunks = [], []
    for request in requests:
        handles.append(engine.submit(request, streaming=True))
        chunks += engine.step()
    chunks += until_idle(engine)
    for handle, tokens in zip(handles, expected, strict=True):
        own = [chunk for chunk in chunks if chunk.handle is handle]
        assert sum((chunk.tokens for chunk in own), ()) == tokens == own[-1].result.tokens
        assert "".join(chunk.text for chunk in own) == own[-1].result.text
        assert [chunk.result for chunk in own[:-1]] == [None] * (len(own) - 1)
        assert own[0].index == handle.index and own[0].request is handle.request
    assert engine.step() == [] and engine.live == 0


def test_who_watches_gets_the_first_token_before_the_program_of_the_others_is_compiled(loaded, run_folder):
    engine = Engine(*loaded, load_tokenizer(run_folder), slots=1)
    first = next(stream := engine.stream(Request([1, 2, 3], 5)))
    before = engine.compilations
    assert len(first.tokens) == 1 and sum(len(chunk.tokens) for chunk in stream) == 4
    assert engine.compilations > before


def test_a_cancelled_request_makes_room_in_the_next_step(engine, monkeypatch):
    monkeypatch.setattr(batch, "STREAM_SECONDS", 1e-9)  # one token a step
    requests = [Request([i], 100) for i in range(4)]
    handles = [engine.submit(request, streaming=True) for request in requests]
    waiting, never = engine.submit(Request([9], 100), streaming=True), engine.submit(Request([10], 100))
    assert {chunk.handle for chunk in engine.step()} == set(handles)
    assert engine.cancel(handles[1]) and engine.cancel(never)
    assert not engine.cancel(handles[1])
    assert {chunk.handle for chunk in engine.step()} == {*handles, waiting} - {handles[1]}
    assert engine.cancel(handles[0])
    chunks = until_idle(engine)
    assert {chunk.handle for chunk in chunks} == {handles[2], handles[3], waiting}
    finished = {chunk.handle: chunk.result.tokens for chunk in chunks if chunk.result}
    assert [finished[handle] for handle in (waiting, handles[2])] == tokens_of(engine, [Request([9], 100), requests[2]])


def test_iterators_share_the_batch_and_closing_one_cancels_its_requests(engine, monkeypatch):
    monkeypatch.setattr(batch, "STREAM_SECONDS", 1e-9)  # one token a step
    requests = [Request([i], 60) for i in range(3)]
    expected = tokens_of(engine, requests)
    own = engine.submit(Request([50], 60))
    streams = [engine.stream(request) for request in requests]
    found = [[], [], []]
    for place in (0, 1, 2, 0, 1):
        found[place].append(next(streams[place]))
    streams[1].close()
    assert engine.live == 3
    for place in (2, 0):
        found[place] += streams[place]
        assert sum((chunk.tokens for chunk in found[place]), ()) == expected[place]
    chunks = until_idle(engine)
    assert {chunk.handle for chunk in chunks} == {own} and chunks[-1].result is not None


def test_a_live_queue_of_one_request_starts_at_once(engine):
    """The next request comes only after the first one's result."""
    answered = threading.Event()

    def live():
        yield Request([1], 5)
        assert answered.wait(timeout=300)
        yield Request([2], 5)

    results = []
    for result in engine.generate(live()):
        results.append(result)
        answered.set()
    assert [result.index for result in results] == [0, 1]
    assert [result.tokens for result in results] == tokens_of(engine, [Request([1], 5), Request([2], 5)])


def test_an_error_of_the_queue_is_raised_and_leaves_nothing_behind(engine):
    def broken():
        yield Request([1], 5)
        raise OSError("the queue is gone")

    with pytest.raises(OSError, match="the queue is gone"):
        list(engine.generate(broken()))
    with pytest.raises(ValueError, match="request 1: the prompt is empty"):
        list(engine.generate(iter([Request([1], 5), Request([], 5)])))
    assert engine.live == 0


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_weights_that_fit_are_shared_and_new_ones_compile_nothing(loaded):
    model, params = loaded
    engine = Engine(model, params, slots=1)
    above = {name: leaf for name, leaf in params.items() if name != "layers"}
    assert pointers(above) <= pointers(engine.params)
    other = Engine(model, engine.params, slots=1)
    assert pointers(other.params) == pointers(engine.params)
    first = tokens_of(engine, [Request([1, 2], 12)])
    assert tokens_of(other, [Request([1, 2], 12)]) == first
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    changed = jax.tree.map(lambda leaf: leaf * 0.5, params)
    compiled.clear()
    engine.set_params(changed)
    assert tokens_of(engine, [Request([1, 2], 12)]) != first and not compiled


def test_embeddings_stand_for_tokens(loaded, engine):
    """The embeddings of tokens give what the tokens do, as a whole prompt and in some of its places."""
    model, params = loaded
    table = np.asarray(params["token_embedding"])
    prompt = [5, 80, 11, 200, 31]
    sampling = SamplingConfig(temperature=0.7)  # no penalty, which knows no ids of embeddings
    (expected,) = tokens_of(engine, [Request(prompt, 10, sampling)])
    whole = Request(max_new_tokens=10, sampling=sampling, embeddings=table[prompt])
    placed = Request(
        [5, 0, 11, 0, 31], 10, sampling, embeddings=table[[200, 80]], embedding_positions=np.asarray([3, 1])
    )
    found = tokens_of(engine, [whole, placed, Request(prompt, 10, sampling)])
    assert found == [expected] * 3


def test_embeddings_of_no_token_give_the_logits_of_the_training_pass(loaded, engine):
    model, params = loaded
    values = np.random.default_rng(3).standard_normal((3, 32), np.float32)
    (result,) = engine.generate([Request([9, 9, 9, 9, 40], 6, embeddings=values, embedding_positions=[0, 1, 3])])
    ids = jnp.asarray([[*result.request.prompt, *result.tokens[:-1]]])
    spliced = np.zeros((1, ids.shape[1], 32), np.float32)
    spliced[0, [0, 1, 3]] = values
    given = np.zeros(ids.shape, bool)
    given[0, [0, 1, 3]] = True
    logits = outputs(model, params, ids, embeddings=InputEmbeddings(spliced, given))[0, 4:]
    assert tuple(np.asarray(logits.argmax(-1)).tolist()) == result.tokens
    wanted = jax.nn.log_softmax(logits)[np.arange(6), result.tokens]
    np.testing.assert_allclose(result.log_probs, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(embeddings=np.zeros((2, 31))), r"embeddings must be \[n, 32\].* found \[2, 31\]"),
        (dict(embeddings=np.zeros((0, 32))), r"n of at least 1"),
        (dict(embeddings=np.full((1, 32), np.nan)), "not finite"),
        (dict(prompt=[1], embeddings=np.zeros((1, 32))), "needs embedding_positions"),
        (dict(prompt=[1], embeddings=np.zeros((1, 32)), embedding_positions=[1]), "not a position of the prompt"),
        (dict(prompt=[1, 2], embeddings=np.zeros((2, 32)), embedding_positions=[1, 1]), "all different"),
        (dict(prompt=[1], embedding_positions=[0]), "give embeddings, too"),
        (dict(embeddings=np.zeros((128, 32))), "prompt of 128 tokens . 5 new ones"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(engine, changes, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(max_new_tokens=5, **changes))
    assert engine.live == 0


def pairs_of(count):
    random = np.random.default_rng(5)
    lengths = random.integers(1, 50, (count, 2)).tolist()
    return zip(*[[random.integers(0, 256, length).tolist() for length in pair] for pair in lengths], strict=True)


def test_scores_are_those_of_the_training_forward_pass(loaded, engine):
    model, params = loaded
    prompts, continuations = pairs_of(12)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    scores = engine.score(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        padded = jnp.asarray([[*prompt, *continuation] + [0] * (100 - len(prompt) - len(continuation))])
        logits = forward(padded)[0, len(prompt) - 1 :][: len(continuation)]
        wanted = jax.nn.log_softmax(logits)[np.arange(len(continuation)), continuation]
        assert score.log_probs.dtype == np.float32
        np.testing.assert_allclose(score.log_probs, wanted, atol=1e-5)
        np.testing.assert_array_equal(score.most_likely, logits.argmax(-1) == np.asarray(continuation))


def test_a_greedy_continuation_is_the_most_likely_and_has_its_own_log_probabilities(engine):
    results = list(engine.generate([Request([3, 1], 20), Request([8], 33)]))
    scores = engine.score([result.request.prompt for result in results], [result.tokens for result in results])
    for result, score in zip(results, scores, strict=True):
        assert score.most_likely.all()
        np.testing.assert_allclose(score.log_probs, result.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1]], [], "found 0 for 1 prompts"),
        ([[1], []], [[1], [1]], "prompt 1 is empty"),
        ([[1]], [[]], "continuation 0 is empty"),
        ([[1]], [[464]], r"continuation 0 has the id 464, outside \[0, 464\)"),
        ([[1] * 100], [[1] * 30], "prompt 0 of 100 tokens . its continuation of 30.*at most 128"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(engine, prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        engine.score(prompts, continuations)
