"""Runs the commands and the Python of docs/how_to/convert.md and docs/how_to/serving.md, in order, on small models."""

import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.chatml import encode_prompt
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.models.config import ModelConfig
from tests.pages import ROOT, blocks, shell

CONFIG = ModelConfig(
    vocab_size=480, hidden_size=48, num_layers=2, num_heads=3, head_dim=16, ffn_size=40, context_length=512
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pages' commands are run, with the checkpoints that they start from."""
    pairs = (b"th", b"he", b"in", b" a", b"ch", b"ec")
    ranks = [*(bytes([byte]) for byte in range(256)), *pairs]
    write_ranks({token: rank for rank, token in enumerate(ranks)}, tmp_path / "small.tiktoken")
    random = np.random.default_rng(0)
    flat = {
        path: (random.standard_normal(shape) * 0.25 + ("scale" in path)).astype(np.float32)
        for path, shape in parameter_shapes(CONFIG).items()
    }
    save_params(tmp_path / "runs" / "tiny", CONFIG, unflatten_dict(flat, sep="/"), tmp_path / "small.tiktoken")
    shutil.copytree(ROOT / "tests" / "golden" / "qwen1_tiny", tmp_path / "Qwen-7B")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_on_converting(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    said, names = "", {}
    for kind, text in blocks("convert.md"):
        if kind == "sh":
            done = shell(text, folder, ROOT)
            said += done.stdout + done.stderr
        elif kind == "python":
            exec(text, names)
    assert "verified: 15 tensors read back" in said
    assert re.search(r"check: logits differ by 0 at most .* the same at 32 of 32 positions", said)
    assert names["logits"].shape == (1, 3, 480) and names["prompt"].endswith("<|im_start|>assistant\n")
    assert sorted(os.listdir(folder / "runs")) == ["continued", "continued_cache", "qwen_7b", "tiny", "unscanned"]
    assert "starting from the weights of exports/tiny" in said and "step 2" in said
    assert sorted(os.listdir(folder / "exports")) == ["padded", "tiny", "tiny_qwen"]


def greedy(folder: Path, messages: list[dict], count: int) -> str:
    """What our model answers, token by token without a cache."""
    model, params = load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    forward = jax.jit(model.apply)
    prompt = encode_prompt(tokenizer, messages)
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] not in (tokenizer.im_end_id, tokenizer.endoftext_id):
        padded = jnp.asarray([ids + [0] * (len(prompt) + count - len(ids))])
        ids.append(int(forward({"params": params}, padded)[0, len(ids) - 1].argmax()))
    return tokenizer.decode([i for i in ids[len(prompt) :] if i < tokenizer.num_ranks])


def test_the_page_on_serving(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    names = {}
    for kind, text in blocks("serving.md"):
        if kind == "sh":
            done = shell(text, folder, ROOT)
            assert "wrote gguf to exports/tiny.gguf" in done.stdout + done.stderr
        elif kind == "python":
            exec(text, names)
    messages = names["messages"]
    expected = greedy(folder / "runs" / "tiny", messages, 16)
    assert names["answer"] == expected
    template = names["chat"].tokenizer.apply_chat_template
    turns = [*messages, {"role": "assistant", "content": "Saved."}, {"role": "user", "content": "  Thanks \n"}]
    for some in (messages, turns, [{"role": "system", "content": "Be brief."}, *messages]):
        ids = template(some, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(load_tokenizer(folder / "exports" / "tiny"), some)
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    for kind, text in blocks("serving.md"):
        if kind == "python llama_cpp":
            exec(text, names)
    # It drops bytes that are no text, and keeps keys and values in float16, so only the beginning is compared.
    assert names["answer"][:5] == expected.replace("\N{REPLACEMENT CHARACTER}", "")[:5]
