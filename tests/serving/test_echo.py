"""Completions that echo their prompt, with log-probabilities: those of the engine's scores and of transformers."""

import asyncio
import gc
import threading
import types
import weakref

import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")

from qwen_jax.conversion import load_pretrained, load_tokenizer  # noqa: E402
from qwen_jax.conversion.converter import convert  # noqa: E402
from qwen_jax.inference import Engine, Request, SamplingConfig  # noqa: E402
from qwen_jax.inference.requests import Score  # noqa: E402
from qwen_jax.serving import protocol, scoring  # noqa: E402
from qwen_jax.serving.engine_thread import EngineThread  # noqa: E402
from tests.fakes import random_run  # noqa: E402
from tests.serving.scripted import serving  # noqa: E402
from tests.serving.test_openai_client import post  # noqa: E402

TEXTS = ["The cat sat on a mat", "The cat sat — 你好", "x", "The cat sat on a mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=256)
    return random_run(tmp_path_factory.mktemp("echo"), **sizes)


@pytest.fixture(scope="module")
def running(folder):
    engine = Engine(*load_pretrained(folder), load_tokenizer(folder), slots=2, prefix_cache_tokens=512)
    with serving(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def prompts(running):
    """Token ids of TEXTS."""
    return [running.engine.tokenizer.encode(text) for text in TEXTS]


def scored(client, prompt, **more):
    given = dict(model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0) | more
    return client.completions.create(**given).choices


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("top", [0, 1, 4])
def test_each_token_after_the_first_has_the_score_of_the_engine(client, running, prompts, max_tokens, top):
    engine = running.engine
    choices = scored(client, prompts, max_tokens=max_tokens, logprobs=top)
    assert [choice.index for choice in choices] == list(range(len(prompts)))
    for choice, ids, text in zip(choices, prompts, TEXTS, strict=True):
        found = choice.logprobs
        (new,) = engine.generate([Request(ids, 3, top_log_probs=top)])
        expected = new.log_probs.tolist()[:max_tokens]
        if len(ids) > 1:
            expected = [*engine.score([ids[:1]], [ids[1:]])[0].log_probs.tolist(), *expected]
        # One token more than the prompt has for each that was asked for; lm-evaluation-harness drops the last one.
        assert found.token_logprobs[0] is None and len(found.tokens) == len(ids) + max_tokens
        assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert choice.text.startswith(text) and choice.finish_reason == "length"
        assert choice.text == text + engine.tokenizer.decode(list(new.tokens[:max_tokens]))
        assert found.text_offset[0] == 0 and sorted(found.text_offset) == found.text_offset
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token
        if not top:
            assert found.top_logprobs is None
            continue
        assert found.top_logprobs[0] is None
        for token, log_prob, others in zip(
            found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True
        ):
            assert top <= len(others) <= top + 1 and others[token] == log_prob <= max(others.values())


def test_the_log_probabilities_are_those_of_transformers(client, folder, prompts, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    convert("orbax", folder, "qwen2", tmp_path / "hf", dtype="float32", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for choice, ids in zip(scored(client, prompts, logprobs=3), prompts, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        targets = [*ids[1:], rows[-1].argmax()]
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], rows[np.arange(len(ids)), targets], atol=1e-4)
        for others, row in zip(choice.logprobs.top_logprobs[1:], rows, strict=True):
            np.testing.assert_allclose(sorted(others.values())[-3:], np.sort(row)[-3:], atol=1e-4)


def test_texts_and_streams_have_what_ids_and_whole_answers_have(client, prompts):
    given = dict(logprobs=2, max_tokens=3, n=2, temperature=1.0, seed=4)
    whole = scored(client, prompts, **given)
    for choice, other in zip(whole, scored(client, TEXTS, **given), strict=True):
        assert choice == other
    streamed = [dict(text="", tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]) for _ in whole]
    for chunk in client.completions.create(model="tiny", prompt=TEXTS, echo=True, stream=True, **given):
        for choice in chunk.choices:
            into = streamed[choice.index]
            into["text"] += choice.text
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                into[name] += values
    for choice, found in zip(whole, streamed, strict=True):
        assert found.pop("text") == choice.text and found == choice.logprobs.model_dump()
    assert whole[0].text != whole[1].text


def test_a_token_that_ends_the_completion_is_among_its_tokens(client, running, prompts):
    """Or lm-evaluation-harness, which drops the last token, would lose one of the prompt's."""
    end = running.engine.tokenizer.im_end_id
    for more in ({}, {"seed": 3, "temperature": 1.0}):
        for choice in scored(client, prompts, logit_bias={str(end): 100}, **more):
            assert choice.logprobs.tokens[-1] == "<|im_end|>" and choice.finish_reason == "stop"
            assert choice.text in TEXTS and choice.logprobs.text_offset[-1] == len(choice.text)


def test_an_echo_without_log_probabilities_is_text(client, running):
    calls = running.service.metrics.registry.get_sample_value("qwen_jax_generated_tokens_total")
    choices = client.completions.create(model="tiny", prompt=TEXTS, echo=True, max_tokens=0).choices
    assert [(choice.text, choice.finish_reason, choice.logprobs) for choice in choices] == [
        (text, "length", None) for text in TEXTS
    ]
    assert running.service.metrics.registry.get_sample_value("qwen_jax_generated_tokens_total") == calls
    (choice,) = client.completions.create(model="tiny", prompt="say", echo=True, max_tokens=4, seed=1).choices
    (plain,) = client.completions.create(model="tiny", prompt="say", max_tokens=4, seed=1).choices
    assert choice.text == "say" + plain.text


def test_many_prompts_are_scored_in_parts_between_which_others_go_on(client, running, prompts, monkeypatch):
    whole = scored(client, prompts * 2)
    parts = []
    score = running.engine.score

    def counted(given, *others, **more):
        parts.append(len(given))
        return score(given, *others, **more)

    monkeypatch.setattr(running.engine, "score", counted)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 40)
    for choice, other in zip(whole, scored(client, prompts * 2), strict=True):
        assert choice.logprobs.tokens == other.logprobs.tokens
        # Other texts share a step, which rounds otherwise.
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(other.logprobs.token_logprobs[1:], abs=1e-4)
    assert sum(parts) == 8 and len(parts) > 2


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(repetition_penalty=1.3)])
def test_one_greedy_token_costs_no_second_computation_of_the_prompt(running, prompts, sampling, monkeypatch):
    """Unless a rule changes which one it is."""
    engine = running.engine
    requests = [Request(ids, 1, sampling, stop_ids=(engine.tokenizer.im_end_id,), top_log_probs=1) for ids in prompts]
    found = scoring.score_prompts(engine, requests, 1)
    for request, (score, chunk) in zip(requests, found, strict=True):
        assert len(score.log_probs) == len(score.top_log_probs) == len(request.prompt) - 1
        assert (chunk is None) == (sampling.repetition_penalty != 1)
        if chunk is not None:
            (wanted,) = engine.generate([request])
            assert chunk.tokens == wanted.tokens and chunk.finish_reason == "length" and chunk.text == wanted.text
            assert chunk.log_probs == pytest.approx(wanted.log_probs.tolist(), abs=1e-4)
            assert chunk.result.behavior_log_probs.tolist() == [0.0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_ends_this_request_alone(client, running, monkeypatch, stream):
    def failing(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(running.engine, "score", failing)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.completions.create(model="tiny", prompt=TEXTS, echo=True, logprobs=1, stream=stream))
    assert len(scored(client, TEXTS)) == len(TEXTS) and running.engine.live == 0


def test_prompts_of_a_client_that_left_are_not_kept_while_others_are_scored(tokenizer, monkeypatch):
    """Or requests that nobody waits for, and that count for no limit, would gather behind one that takes long."""
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 1)  # each prompt is a part of its own
    begun, permits = threading.Semaphore(0), threading.Semaphore(0)

    def score(prompts, continuations, top_log_probs):
        begun.release()
        assert permits.acquire(timeout=300)
        return [Score(np.zeros(len(one), np.float32), np.zeros(len(one), bool)) for one in continuations]

    thread = EngineThread(types.SimpleNamespace(slots=6, tokenizer=tokenizer, score=score), 0)
    thread.start()

    async def check():
        requests = [Request([1, 2, 3], 0)] * 3
        first = thread.submit(requests, streaming=False, scored=0)
        assert await asyncio.to_thread(begun.acquire, timeout=300)  # the first part is computed
        second = thread.submit(requests, streaming=False, scored=0)
        assert thread.open == 6
        second.cancel()
        left = weakref.ref(second)
        del second
        permits.release()
        assert await asyncio.to_thread(begun.acquire, timeout=300)  # the second part is computed
        gc.collect()
        assert left() is None and thread.open == 2
        permits.release(2)
        assert [place async for place, _ in first] == [0, 1, 2]
        assert [len(score.log_probs) for score in first.scores.values()] == [2, 2, 2]

    try:
        asyncio.run(check())
    finally:
        permits.release(9)
        thread.stop()
    assert thread.open == 0


def test_an_answer_tells_a_limited_number_of_log_probabilities(client, prompts, monkeypatch):
    told = 2 * 5 * len(prompts[0])
    monkeypatch.setattr(protocol, "MOST_ECHOED", told)
    assert len(scored(client, [prompts[0]] * 2, logprobs=4)) == 2
    monkeypatch.setattr(protocol, "MOST_ECHOED", told - 1)
    with pytest.raises(openai.BadRequestError, match=f"logprobs: the echo would tell {told} .*fewer prompts"):
        scored(client, [prompts[0]] * 2, logprobs=4)


def test_limits_of_an_echo(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens: must be an integer, at least 1"):
        client.completions.create(model="tiny", prompt="x", max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="256 tokens"):
        client.completions.create(model="tiny", prompt="x" * 256, echo=True, logprobs=1, max_tokens=1)
    (choice,) = scored(client, "x" * 256, max_tokens=0)
    assert len(choice.logprobs.tokens) == 256
    with pytest.raises(openai.BadRequestError, match="echo: must be true or false"):
        client.completions.create(model="tiny", prompt="x", extra_body={"echo": "yes"})


def test_the_requests_of_lm_evaluation_harness_are_scored(running, prompts):
    """By its own code that writes requests and reads answers."""
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    api = lm_eval.LocalCompletionsAPI
    url, path = running.url, "/v1/completions"
    body = api._create_payload(types.SimpleNamespace(model="tiny"), prompts[:2], generate=False)
    _, _, answer = post(url, path, body)
    found = api.parse_logprobs(answer, prompts[:2], [len(ids) - 3 for ids in prompts[:2]])
    expected = running.engine.score([ids[:-3] for ids in prompts[:2]], [ids[-3:] for ids in prompts[:2]])
    assert [log_prob for log_prob, _ in found] == pytest.approx([one.log_probs.sum() for one in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [one.most_likely.all() for one in expected] == [False, False]
    (result,) = running.engine.generate([Request(prompts[0], 3)])
    _, _, answer = post(url, path, body | {"prompt": [[*prompts[0], *result.tokens]]})
    ((log_prob, greedy),) = api.parse_logprobs(answer, [prompts[0]], [len(prompts[0])])
    assert greedy and log_prob == pytest.approx(result.log_probs.sum(), abs=1e-4)
