"""Generation: token for token what transformers generates, few compilations, text that streams and stays text."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.generate import generate, text_pieces
from qwen_jax.inference.generate import Generator, bucket
from qwen_jax.inference.sampling import SamplingConfig
from tests.fakes import random_run

PROMPTS = ["def f(x):\n", "你好，世界 123", "a" * 70]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random model over a vocabulary of single bytes; large weights, so that greedy choices are not all alike."""
    sizes = dict(hidden_size=64, num_layers=3, num_heads=4, ffn_size=96, max_length=256)
    return random_run(tmp_path_factory.mktemp("generate"), **sizes)


@pytest.fixture(scope="module")
def converted(run_folder):
    return convert("orbax", run_folder, "qwen2", run_folder.parent / "qwen2", progress=False)


def greedy(folder, prompt, new_tokens=60, stop_ids=()):
    model, params = load_pretrained(folder)
    return list(Generator(model, params).stream(prompt, new_tokens, stop_ids))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers_token_for_token(run_folder, converted, prompt):
    torch = pytest.importorskip("torch", reason="compares with transformers' generate")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' generate")
    tokenizer = load_tokenizer(run_folder)
    ids = tokenizer.encode(prompt)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(converted)
    stop = (tokenizer.endoftext_id, tokenizer.im_end_id)
    with torch.no_grad():
        generated = theirs.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids):].tolist()
    generated = generated[: next((i for i, token in enumerate(generated) if token in stop), len(generated))]
    assert len(set(generated)) > 5
    assert greedy(run_folder, ids, stop_ids=stop) == greedy(converted, ids, stop_ids=stop) == generated


def test_generation_agrees_with_the_training_forward_pass(run_folder):
    model, params = load_pretrained(run_folder)
    ids = [100, 101, 102, 103]
    new = greedy(run_folder, ids, 20)
    logits = model.apply({"params": params}, jnp.asarray([ids + new], jnp.int32))
    assert np.asarray(logits[0, 3:-1].argmax(-1)).tolist() == new


def test_stop_ids_end_it_and_are_not_shown(run_folder):
    whole = greedy(run_folder, [1, 2, 3])
    cut = next(i for i, token in enumerate(whole) if i >= 5 and token not in whole[:i])
    assert greedy(run_folder, [1, 2, 3], stop_ids=[whole[cut]]) == whole[:cut]


def test_two_programs_serve_all_prompts_of_a_bucket(run_folder):
    model, params = load_pretrained(run_folder)
    generator = Generator(model, params)
    for prompt in ([1], [5, 6, 7], list(range(40))):
        assert len(list(generator.stream(prompt, 20))) == 20
    assert generator.compilations() == 2
    assert [bucket(n, 1000) for n in (1, 64, 65, 600, 999)] == [64, 64, 128, 1000, 1000]


def test_draws_follow_the_seed(run_folder):
    model, params = load_pretrained(run_folder)
    generator = Generator(model, params, SamplingConfig(temperature=1.0, top_p=0.9))
    first, again, other = (list(generator.stream([1, 2, 3], 30, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_text_streams_in_whole_characters(run_folder):
    tokenizer = load_tokenizer(run_folder)
    text = "né 世界 🙂!"
    pieces = list(text_pieces(tokenizer, iter(tokenizer.encode(text))))
    assert pieces == list(text)
    assert "".join(text_pieces(tokenizer, iter(tokenizer.encode("é")[:1]))) == "\ufffd"


def test_a_control_token_in_the_prompt_stays_text(run_folder):
    tokenizer = load_tokenizer(run_folder)
    assert max(tokenizer.encode("<|im_end|><|endoftext|>")) < 256


def test_the_command_streams_text_from_any_format(run_folder, converted, plain_environment):
    outputs = []
    for folder in (run_folder, converted):
        command = [sys.executable, "-m", "qwen_jax.generate", "--checkpoint", folder, "--prompt", "hello"]
        command += ["--max_new_tokens", "24"]
        done = subprocess.run(command, capture_output=True, env=plain_environment, check=True)
        outputs.append(done.stdout)
    expected = "".join(generate(checkpoint=run_folder, prompt="hello", max_new_tokens=24)) + "\n"
    assert outputs[0] == outputs[1] == expected.encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "empty"), ({"prompt": "a" * 300}, "max_length of 256"), ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"), ({"checkpoint": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run_folder, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        "".join(generate(**{"checkpoint": run_folder, "prompt": "x", **changes}))


def test_an_id_outside_the_vocabulary_is_refused(run_folder):
    model, params = load_pretrained(run_folder)
    with pytest.raises(ValueError, match="outside"):
        Generator(model, params).stream([464], 5)
