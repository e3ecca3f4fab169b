"""Runs the commands and the Python of docs/convert.md and docs/serving.md, in order, on small models."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.data.chatml import encode_prompt
from tests.fakes import random_run

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(sh|python|python llama_cpp)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = dict(hidden_size=48, num_layers=2, num_heads=3, ffn_size=40, max_length=512)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pages' commands are run, with the checkpoints that they start from."""
    (tmp_path / "runs").mkdir()
    random_run(tmp_path / "runs", **MODEL).rename(tmp_path / "runs" / "tiny")
    shutil.copytree(ROOT / "tests" / "golden" / "qwen1_tiny", tmp_path / "Qwen-7B")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(text: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_page_on_converting(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    said, names = "", {}
    for kind, text in blocks("convert.md"):
        if kind == "sh":
            said += shell(text)
        else:
            exec(text, names)
    assert "verified: 15 tensors read back" in said
    assert re.search(r"check: logits differ by 0 at most .* the same at 32 of 32 positions", said)
    assert names["logits"].shape == (1, 3, 464) and names["prompt"].endswith("<|im_start|>assistant\n")
    assert sorted(os.listdir(folder / "runs")) == ["bytes.tiktoken", "qwen_7b", "tiny", "unscanned"]
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
    return tokenizer.decode([i for i in ids[len(prompt):] if i < tokenizer.num_ranks])


def test_the_page_on_serving(folder):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    names = {}
    for kind, text in blocks("serving.md"):
        if kind == "sh":
            assert "wrote gguf to exports/tiny.gguf" in shell(text)
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
    # Its chat interface keeps keys and values in float16, so only the beginning is compared.
    assert names["answer"][:4] == expected[:4]
