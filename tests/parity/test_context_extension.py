"""Context extension (report 2.3.2): the released code past its training length, and transformers' sliding windows."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import convert, load_pretrained
from qwen_jax.inference import Engine, Request, logits
from qwen_jax.models.decoding import DecodingCache, decode, decoding_logits, unstack_layers
from qwen_jax.models.positions import dynamic_ntk_alpha
from qwen_jax.models.transformer import Qwen

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden"
TINY = ROOT / "tests" / "golden" / "qwen1_tiny"
FOLDERS = {"tiny": TINY, "small": SHARED / "qwen1_small", "plain": SHARED / "qwen1_plain"}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    """(model, params, outputs of the released code) of one golden model."""
    folder = FOLDERS[request.param]
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} at {folder.parent}: set QWEN_JAX_SHARED to the folder that holds golden/")
    model, params = load_pretrained(folder)
    return model, params, dict(np.load(folder / "expected.npz"))


def numbers_after(prefix: str, names) -> list[int]:
    return [int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)]


def worst(ours, theirs) -> float:
    """Largest difference, in parts of the logits' scale."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_logits_and_alpha_of_every_length(golden):
    model, params, expected = golden
    lengths = numbers_after("ids_", expected)
    assert min(lengths) < model.config.context_length < max(lengths) // 2
    for length in lengths:
        ours = logits(model, params, expected[f"ids_{length}"])
        assert ours.dtype == jnp.float32 and ours.shape == (2, length, model.config.vocab_size)
        assert worst(ours[:, -8:], expected[f"logits_{length}"]) < 1e-4, f"{length} tokens"
        if model.config.use_dynamic_ntk:
            assert dynamic_ntk_alpha(jnp.asarray(length), model.config.context_length) == expected[f"alpha_{length}"]


def test_greedy_decoding_with_the_cache(golden):
    """Prompts of 20 and 40 tokens, 24 more with the cache: past the training length in prefill, or on the way."""
    model, params, expected = golden
    layered = unstack_layers(params, model.config.num_layers)
    for length in numbers_after("prompt_", expected):
        prompt, theirs = expected[f"prompt_{length}"], expected[f"greedy_logits_{length}"]

        @jax.jit
        def step(tokens, starts, cache):
            hidden, cache = decode(model.config, layered, tokens, starts, cache)
            return decoding_logits(model.config, layered, hidden[:, -1:])[:, 0], cache

        cache = DecodingCache.empty(model.config, 1, length + 24, jnp.asarray([length]))
        step_logits, cache = step(jnp.asarray(prompt), jnp.zeros(1, int), cache)
        for index, token in enumerate(expected[f"greedy_{length}"]):
            assert worst(step_logits[0], theirs[index]) < 1e-4, f"prompt of {length}, new token {index}"
            assert int(step_logits[0].argmax()) == token
            step_logits, cache = step(jnp.asarray([[token]]), jnp.asarray([length + index]), cache)


def test_the_engine_gives_the_greedy_tokens_of_the_released_code(golden):
    """Prompts are padded to buckets and decode in one batch: alpha must come from each prompt alone."""
    model, params, expected = golden
    if not model.config.use_dynamic_ntk:  # the released code goes on past the length; ours refuses
        model = Qwen(dataclasses.replace(model.config, context_length=256))
    lengths = numbers_after("prompt_", expected)
    requests = [Request(expected[f"prompt_{length}"][0], 24) for length in lengths]
    for result in Engine(model, params).generate(requests):
        assert list(result.tokens) == expected[f"greedy_{lengths[result.index]}"].tolist()


@pytest.mark.parametrize("switched", [{}, {"use_dynamic_ntk": False}, {"use_logn": False}])
def test_each_switch_matters_past_the_training_length_and_not_before(switched):
    model, params = load_pretrained(TINY)
    expected = np.load(TINY / "expected.npz")
    model = Qwen(dataclasses.replace(model.config, **switched))
    assert worst(logits(model, params, expected["ids_8"]), expected["logits_8"]) < 1e-4
    assert (worst(logits(model, params, expected["ids_100"])[:, -8:], expected["logits_100"]) > 1e-2) == bool(switched)


@pytest.mark.parametrize("window", [1, 5, 16])
def test_windows_by_layer_equal_sliding_windows_of_transformers(window, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model, params = load_pretrained(TINY)
    folder = convert("qwen", TINY, "qwen2", tmp_path / "qwen2", progress=False)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.use_sliding_window, config.sliding_window = True, window
    config.layer_types = ["sliding_attention", "full_attention"]
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    tokens = np.load(TINY / "expected.npz")["ids_64"]
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    plain = dataclasses.replace(model.config, use_dynamic_ntk=False, use_logn=False)
    windowed = Qwen(dataclasses.replace(plain, window_sizes=(window, 0)))
    assert worst(logits(windowed, params, tokens), wanted) < 1e-4
    assert worst(logits(Qwen(plain), params, tokens), wanted) > 1e-2
