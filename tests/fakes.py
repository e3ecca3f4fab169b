"""Examples made by arithmetic and models made by chance, for tests that need no corpus and no training."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.models.config import ModelConfig


class FakeExamples:
    """Rows that are a function of their index: runs of a seeded arithmetic sequence, learnable in a few steps."""

    def __init__(self, length=16, vocab_size=61, count=400, repeat=True, seed=0, packed=False):
        self.length, self.vocab_size, self.count, self.repeat, self.seed = length, vocab_size, count, repeat, seed
        self.bytes_per_token, self.columns = 2.0, ("segment_ids", "positions") if packed else ()
        self.fingerprint = f"fake-{seed}-{length}-{vocab_size}"
        self.reads: list[tuple[int, int]] = []

    def __len__(self):
        return self.count

    def read(self, start, stop):
        self.reads.append((start, stop))
        assert self.repeat or stop <= self.count
        rows = np.arange(start, stop)[:, None]
        tokens = (rows * 7 + self.seed + np.arange(self.length) * (1 + rows % 3)) % self.vocab_size
        weights = np.ones(tokens.shape, np.float32)
        weights[rows[:, 0] % 5 == 0, : self.length // 2] = 0.0
        return {"tokens": tokens.astype(np.int32), "loss_weights": weights, **self._segments(rows)}

    def _segments(self, rows):
        """Two documents a row, the second of which begins elsewhere in each."""
        if not self.columns:
            return {}
        begin, place = 1 + rows % (self.length - 1), np.arange(self.length)
        second = place >= begin
        return {
            "segment_ids": (1 + second).astype(np.int32),
            "positions": (place - second * begin).astype(np.int32),
        }


def small_model(**changes) -> ModelConfig:
    """A float32 model whose every axis divides by 8 devices in any layout."""
    values = dict(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        ffn_size=48,
        head_dim=8,
        context_length=64,
        dtype="float32",
        remat="none",
    )
    return ModelConfig(**{**values, **changes})


def random_run(folder: Path, spread: float = 0.25, **sizes) -> Path:
    """A run folder with random weights, large enough that greedy choices differ, over a vocabulary of single bytes."""
    write_ranks({bytes([byte]): byte for byte in range(256)}, folder / "bytes.tiktoken")
    config = ModelConfig(vocab_size=464, head_dim=16, **sizes)
    random = np.random.default_rng(0)
    flat = {
        path: (random.standard_normal(shape) * spread + ("scale" in path)).astype(np.float32)
        for path, shape in parameter_shapes(config).items()
    }
    save_params(folder / "run", config, unflatten_dict(flat, sep="/"), folder / "bytes.tiktoken")
    return folder / "run"


def text_corpus(folder: Path, documents: int = 60) -> Path:
    """Small documents in `folder`/text, and a vocabulary trained on them in `folder`/small.tiktoken."""
    words = random.Random(0)
    (folder / "text").mkdir()
    for index in range(documents):
        lines = [" ".join(words.choices("the cat sat on a mat and 1984".split(), k=9)) for _ in range(12)]
        (folder / "text" / f"{index}.txt").write_text(".\n".join(lines))
    # Enough different words for the vocabulary to be learnt from.
    other = ["".join(words.choices("abcdefghij", k=6)) for _ in range(80)]
    (folder / "text" / "long.txt").write_text(" ".join(other * 3))
    subprocess.run(
        [
            sys.executable,
            "tools/build_tokenizer.py",
            "--input",
            folder / "text",
            "--size",
            "512",
            "--output",
            folder / "small.tiktoken",
        ],
        check=True,
        capture_output=True,
    )
    return folder
