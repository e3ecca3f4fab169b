"""Rules that a request may have beside others that have none: penalties, biases, the most probable tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.inference import Engine, Request, SamplingConfig
from tests.fakes import random_run

PLAIN = SamplingConfig(temperature=1.0)
PENALIZED = SamplingConfig(presence_penalty=0.75, frequency_penalty=1.5)
RULES = [
    dict(),
    dict(sampling=PENALIZED),
    dict(sampling=SamplingConfig(frequency_penalty=-1.0, repetition_penalty=1.3), logit_bias={7: 2.5, 300: 4.0}),
    dict(logit_bias={40 + i: -100.0 for i in range(20)}, top_log_probs=3),
    dict(sampling=PLAIN, top_log_probs=20),
    dict(sampling=SamplingConfig(temperature=1.0, presence_penalty=2.0, min_p=0.01)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=128)
    return random_run(tmp_path_factory.mktemp("rules"), **sizes)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def engine(loaded, folder):
    return Engine(*loaded, load_tokenizer(folder), slots=4, prefix_cache_tokens=256)


@pytest.fixture(scope="module")
def logits_of(loaded):
    """Logits after each of up to 64 ids, by a pass over all of them."""
    model, params = loaded
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids))

    def logits(ids):
        padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
        return np.asarray(forward(padded))[0, : len(ids)].astype(np.float64)

    return logits


def requests_of(rules=RULES):
    return [Request([i, 9, 9, i + 1], 16 + i, seed=i, **rule) for i, rule in enumerate(rules)]


def by_request(results):
    return sorted(results, key=lambda result: result.index)


def test_greedy_tokens_are_those_of_the_rules_applied_to_whole_passes(engine, logits_of):
    """Numpy of its own, token by token: the prompt counts for the repetition penalty alone."""
    requests = [request for request in requests_of() if not request.sampling.temperature]
    for result in engine.generate(requests):
        request, rules = result.request, result.request.sampling
        for place, token in enumerate(result.tokens):
            before = [*request.prompt, *result.tokens[:place]]
            scores = logits_of(before)[-1]
            for biased, value in request.logit_bias.items():
                scores[biased] += value
            for known in set(before):
                scores[known] *= rules.repetition_penalty if scores[known] < 0 else 1 / rules.repetition_penalty
            for known in set(result.tokens[:place]):
                scores[known] -= rules.presence_penalty + rules.frequency_penalty * result.tokens[:place].count(known)
            assert token == scores.argmax()
    plain = next(iter(engine.generate([Request([1, 9, 9, 2], 17)])))
    assert plain.tokens != next(iter(engine.generate(requests[1:2]))).tokens


def test_rules_act_on_their_own_row_alone(loaded, engine):
    """Together, alone, streamed, begun one after another, and with prompts that the prefix cache has."""
    together = by_request(engine.generate(requests_of()))
    single = Engine(*loaded, slots=1)
    for request, result in zip(requests_of(), together, strict=True):
        (alone,) = single.generate([request])
        assert alone.tokens == result.tokens
        chunks = list(engine.stream(request))
        assert sum((chunk.tokens for chunk in chunks), ()) == result.tokens
        ranked = sum((chunk.top_log_probs for chunk in chunks), ())
        assert ranked == chunks[-1].result.top_log_probs and len(ranked) == len(result.top_log_probs)
    handles, chunks = [], []
    for request in requests_of():
        handles.append(engine.submit(request))
        chunks += engine.step()
    while engine.live:
        chunks += engine.step()
    finished = {chunk.handle: chunk.result.tokens for chunk in chunks if chunk.result}
    assert [finished[handle] for handle in handles] == [result.tokens for result in together]
    long = [Request([5] * 40, 12, rule["sampling"], seed=3) for rule in RULES[1:3]]
    first, again = ([result for result in by_request(engine.generate(long))] for _ in range(2))
    assert [one.tokens for one in again] == [one.tokens for one in first]
    assert all(one.cached_tokens >= 32 for one in again)


def test_the_most_probable_tokens_are_those_of_the_unmodified_logits(engine, logits_of):
    results = by_request(engine.generate(requests_of()))
    for result in results:
        asked = result.request.top_log_probs
        assert len(result.top_log_probs) == (len(result.tokens) if asked else 0)
        for place, ranked in enumerate(result.top_log_probs):
            before = [*result.request.prompt, *result.tokens[:place]]
            wanted = np.asarray(jax.nn.log_softmax(logits_of(before)[-1]))
            assert [token for token, _ in ranked] == np.argsort(-wanted)[:asked].tolist()
            np.testing.assert_allclose([value for _, value in ranked], np.sort(wanted)[::-1][:asked], atol=1e-4)
            own = dict(ranked).get(result.tokens[place])
            assert own in (None, float(result.log_probs[place]))


def test_other_values_compile_nothing_and_plain_requests_use_the_programs_they_had(loaded, caplog):
    engine = Engine(*loaded, slots=2)
    plain = [Request([i], 12, PLAIN, seed=i) for i in range(4)]
    with caplog.at_level("INFO", "qwen_jax.inference"):
        expected = [result.tokens for result in by_request(engine.generate(plain))]
        assert not any(word in caplog.text for word in ("counted", "biases", "most likely"))
        known = engine.compilations
        for presence, bias, top in ((0.5, 1.0, 3), (-1.5, -7.0, 20)):
            rules = SamplingConfig(1.0, 5, 0.9, 1.1, 0.05, presence, presence / 2)
            list(engine.generate([Request([i], 12, rules, logit_bias={i: bias}, top_log_probs=top) for i in range(4)]))
            compiled, known = engine.compilations - known, engine.compilations
    assert compiled == 0 and "counted" in caplog.text
    assert [result.tokens for result in by_request(engine.generate(plain))] == expected
    assert engine.compilations == known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(logit_bias={464: 1.0}), r"logit_bias has the id 464, outside \[0, 464\)"),
        (dict(logit_bias={"7": 1.0}), "logit_bias must be integers"),
        (dict(logit_bias={7: 101.0}), "logit_bias of 7 must be from -100.0 to 100.0, found 101.0"),
        (dict(logit_bias={7: float("nan")}), "logit_bias of 7 must be"),
        (dict(logit_bias=[7]), "numbers by token id, found list"),
        (dict(logit_bias=dict.fromkeys(range(1025), 1.0)), "1024 tokens at most, found 1025"),
        (dict(top_log_probs=21), "top_log_probs must be an integer of at least 0, below 21, found 21"),
    ],
)
def test_rules_that_cannot_be_are_refused(engine, changes, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(Request([1], 5, **changes))
    assert engine.live == 0
