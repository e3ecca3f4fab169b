"""The engine: what transformers generates, whatever the batch, on any mesh, with few compilations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.inference import Engine, Request, SamplingConfig, programs
from qwen_jax.inference.admission import PREFILL_CHUNK, bucket
from qwen_jax.inference.batch import rules_of
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import outputs_of_row, random_run, small_model

SAMPLING = SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random model over a vocabulary of single bytes; large weights, so that greedy choices are not all alike."""
    sizes = dict(hidden_size=64, num_layers=2, num_heads=4, ffn_size=96, context_length=256)
    return random_run(tmp_path_factory.mktemp("engine"), **sizes)


@pytest.fixture(scope="module")
def loaded(run_folder):
    return load_pretrained(run_folder)


@pytest.fixture(scope="module")
def tokenizer(run_folder):
    return load_tokenizer(run_folder)


@pytest.fixture(scope="module")
def engine(loaded, tokenizer):
    return Engine(*loaded, tokenizer, slots=4)


def requests_of(count, seed=0, longest=90, **options):
    """Prompts of 1 to `longest` tokens and as many new ones."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, (count, 2)).tolist()
    return [
        Request(random.integers(0, 256, length).tolist(), new, seed=i, **options)
        for i, (length, new) in enumerate(lengths)
    ]


def by_request(results):
    return sorted(results, key=lambda result: result.index)


def test_greedy_equals_transformers_token_for_token(run_folder, engine, tokenizer):
    torch = pytest.importorskip("torch", reason="compares with transformers' generate")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' generate")
    folder = convert("orbax", run_folder, "qwen2", run_folder.parent / "qwen2", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    stop = (tokenizer.endoftext_id, tokenizer.im_end_id)
    prompts = [tokenizer.encode(text) for text in ("def f(x):\n", "你好，世界 123", "a" * 70, "b", "no")]
    for penalty in (1.0, 1.3):
        sampling = SamplingConfig(repetition_penalty=penalty)
        results = by_request(engine.generate([Request(ids, 40, sampling, stop) for ids in prompts]))
        for ids, result in zip(prompts, results, strict=True):
            with torch.no_grad():
                whole = theirs.generate(
                    torch.tensor([ids]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
                )
            generated = whole[0, len(ids) :].tolist()
            end = next((i + 1 for i, token in enumerate(generated) if token in stop), len(generated))
            assert list(result.tokens) == generated[:end]
        assert len({token for result in results for token in result.tokens}) > 20


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLING, SamplingConfig(temperature=1.0)])
def test_a_continuation_does_not_depend_on_its_batch(loaded, engine, sampling):
    """Thirteen requests for four rows, of other lengths and other rules beside them, and each alone."""
    alone = Engine(*loaded, slots=1)
    requests = requests_of(9, longest=60, sampling=sampling)
    requests += requests_of(4, seed=1, longest=60, sampling=SamplingConfig(temperature=2.0))
    results = by_request(engine.generate(requests))
    assert [result.index for result in results] == list(range(13))
    for result in results[:9]:
        (single,) = alone.generate([result.request])
        assert result.tokens == single.tokens and len(result.tokens) == result.request.max_new_tokens
        np.testing.assert_allclose(result.log_probs, single.log_probs, atol=1e-4)
    again = by_request(engine.generate(requests[::-1]))[::-1]
    assert [result.tokens for result in again] == [result.tokens for result in results]


def test_log_probabilities_are_those_of_the_training_forward_pass(loaded, engine):
    model, params = loaded
    for result in engine.generate(requests_of(6, sampling=SAMPLING)):
        ids = [*result.request.prompt, *result.tokens]
        wanted = jax.nn.log_softmax(outputs_of_row(model, params, ids, 256))
        wanted = np.asarray(wanted)[np.arange(len(result.request.prompt) - 1, len(ids) - 1), result.tokens]
        np.testing.assert_allclose(result.log_probs, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        (dict(fsdp=4, tensor=2), {}),
        (dict(fsdp=2, tensor=2, sequence=2), dict(num_kv_heads=2, tie_embeddings=True)),
    ],
)
def test_any_mesh_gives_the_same(tmp_path, loaded, axes, changes):
    sizes = dict(hidden_size=64, num_layers=2, num_heads=4, ffn_size=96, context_length=256)
    model, params = load_pretrained(random_run(tmp_path, **sizes, **changes)) if changes else loaded
    requests = requests_of(7, longest=30) + requests_of(4, seed=1, longest=30, sampling=SAMPLING)
    expected = by_request(Engine(model, params, slots=4).generate(requests))
    sharded = Engine(model, params, mesh=make_mesh(MeshConfig(**axes)), slots=4)
    assert not sharded.params["layers"][0]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    for one, other in zip(by_request(sharded.generate(requests)), expected, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_the_cache_lies_on_the_mesh_like_the_model():
    state = programs.empty_state(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), small_model(), 8, 64)
    shard = state.cache.layers[0].key.addressable_shards[0].data.shape
    assert shard == (8 // 4, 4 // 2, 64, 8)


def test_compilations_are_counted_and_bounded(loaded, caplog):
    """300 requests of all lengths: the programs of the powers of two; then none."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    model, params = loaded
    before, requests = len(compiled), requests_of(300)
    with caplog.at_level("INFO", "qwen_jax.inference"):
        engine = Engine(model, params, slots=3, context_length=200)
        assert len(list(engine.generate(requests))) == 300
    assert 0 < len(compiled) - before <= engine.compilations == len(caplog.records)
    prompts, caches = 4, 3  # 16 to 128 tokens; 64 to 256 slots
    assert engine.compilations <= 1 + 3 * prompts + 3 + 3 * prompts * caches + 2 * caches
    assert len(list(engine.generate(requests))) == 300
    engine.set_params(jax.tree.map(np.asarray, params))
    before = len(compiled)
    assert len(list(engine.generate(requests[:40]))) == 40
    assert len(compiled) == before
    assert [bucket(n, 16) for n in (1, 16, 17, 600)] == [16, 16, 32, 1024]


def test_the_cache_is_updated_in_place(loaded):
    """The compiled step takes over the memory of the batch instead of a second cache."""
    model, params = loaded
    engine = Engine(model, params)
    state = programs.empty_state(None, model.config, 16, 256)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers))
    lowered = programs.generate.lower(
        None,
        model.config,
        engine.params,
        state,
        np.ones(16, bool),
        rules_of([None] * 16, model.config.vocab_size),
        np.int32(1),
        np.int32(0),
        True,
        False,
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size


def test_rows_are_refilled_from_any_iterable_as_they_become_free(engine):
    taken = []

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield Request([index % 200], 5)

    results = list(itertools.islice(engine.generate(endless()), 40))
    assert sorted(result.index for result in results) == list(range(40))
    assert len(taken) <= 40 + 2 * engine.slots


def test_stop_ids_end_it_and_count(engine):
    (whole,) = engine.generate([Request([1, 2, 3], 60)])
    assert whole.finish_reason == "length" and len(whole.tokens) == 60
    cut = next(i for i, token in enumerate(whole.tokens) if i >= 5 and token not in whole.tokens[:i])
    others = sorted(set(range(256)) - set(whole.tokens))[:20]
    (ended,) = engine.generate([Request([1, 2, 3], 60, stop_ids=[*others, whole.tokens[cut]])])
    assert ended.finish_reason == "stop_id" and ended.tokens == whole.tokens[: cut + 1]
    assert len(ended.log_probs) == cut + 1
    assert whole.text.startswith(ended.text) and len(ended.text) < len(whole.text)


def test_stop_strings_end_it_across_tokens(engine, tokenizer):
    """The vocabulary is of single bytes: each string of several characters lies across tokens."""
    (whole,) = engine.generate([Request([65, 66], 60)])
    stop = whole.text[20:23]
    (ended,) = engine.generate([Request([65, 66], 60, stop_strings=["never", stop])])
    assert ended.finish_reason == "stop_string"
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert stop in tokenizer.decode(ended.tokens) and stop not in tokenizer.decode(ended.tokens[:-1])


def test_the_stream_is_the_result_in_pieces(engine, tokenizer):
    request = Request(tokenizer.encode("hello"), 60, SAMPLING, stop_strings=["zq"])
    (result,) = engine.generate([request])
    pieces = list(engine.stream(request))
    assert sum((piece.tokens for piece in pieces), ()) == result.tokens
    assert "".join(piece.text for piece in pieces) == result.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == result.finish_reason and len(pieces) > 2


def test_a_prompt_longer_than_a_chunk(tmp_path):
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=32, context_length=4096)
    model, params = load_pretrained(random_run(tmp_path, **sizes))
    prompt = np.random.default_rng(0).integers(0, 256, PREFILL_CHUNK + 300)
    (result,) = Engine(model, params, slots=1).generate([Request(prompt, 8)])
    ids = [*prompt.tolist(), *result.tokens]
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))(jnp.asarray([ids], jnp.int32))[0]
    assert tuple(np.asarray(logits[len(prompt) - 1 : -1].argmax(-1)).tolist()) == result.tokens


def test_draws_follow_the_seed_and_new_weights(loaded):
    model, params = loaded
    engine = Engine(model, params, slots=2)
    requests = [Request([1, 2, 3], 30, SamplingConfig(temperature=1.0), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (result.tokens for result in by_request(engine.generate(requests)))
    assert first == again != other
    engine.set_params(jax.tree.map(lambda leaf: leaf * 0.5, params))
    (changed,) = engine.generate(requests[:1])
    assert changed.tokens != first


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "request 1: the prompt is empty"),
        (Request([464], 5), r"id 464, outside \[0, 464\)"),
        (Request([1], 256), "prompt of 1 tokens . 256 new ones.*at most 256 tokens, the model's context_length of 256"),
        (Request("text", 5), "found text: encode it"),
        (Request([1.5], 5), "must be integers, found float64"),
        (Request([[1]], 5), r"array of shape \[1, 1\]"),
        (Request([1], 5, stop_ids=[9999]), "stop_ids has the id 9999"),
        (Request([1], 0), "max_new_tokens must be an integer of at least 1, found 0"),
        (Request([1], 5, seed=-1), "seed must be"),
        (Request([1], 5, stop_strings=[""]), "that are not empty"),
        (Request([1], 5, stop_strings="ab"), "sequence of strings"),
        ([1, 2], "expected a Request, found list"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([Request([1], 5), request_])


def test_an_engine_that_cannot_be_is_refused(loaded):
    model, params = loaded
    with pytest.raises(ValueError, match="stop_strings .* needs a tokenizer"):
        Engine(model, params).stream(Request([1], 5, stop_strings=["a"]))
    with pytest.raises(ValueError, match="context_length must be from 2 to 256"):
        Engine(model, params, context_length=257)
    with pytest.raises(ValueError, match="the engine's context_length"):
        Engine(model, params, context_length=20).stream(Request([1], 20))
    with pytest.raises(ValueError, match="slots"):
        Engine(model, params, slots=0)
    with pytest.raises(ValueError, match=r"parameter .*'output'.* is \[64, 463\]"):
        Engine(model, {**params, "output": params["output"][:, 1:]})
    with pytest.raises(ValueError, match="is int32, expected floating-point"):
        Engine(model, {**params, "output": params["output"].astype(jnp.int32)})
    with pytest.raises(ValueError, match="have no .*'output'"):
        Engine(model, {name: leaf for name, leaf in params.items() if name != "output"})
