"""Small models, and a small vocabulary whose byte ranks are, as in the released one, not the bytes' values."""

import collections
import random
import shutil

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.models.config import ModelConfig

CORPUS = (
    "the quick brown fox jumps over the lazy dog, and then the other dogs don't. 2023 and 1999.\n\n"
    "你好，世界。你好，你们好！ 世界很大，世界很小。\n  été après l'été; straße, größer. привет, приветы\n"
) * 3


def _train_ranks(corpus: str, merges: int, seed: int = 0) -> dict[bytes, int]:
    """Byte-pair encoding of whole words of a corpus, written to be obvious rather than fast."""
    order = list(range(256))
    random.Random(seed).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    words = [[bytes([byte]) for byte in word.encode()] for word in corpus.replace(" ", "\0 ").split("\0")]
    for _ in range(merges):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        fresh = [(pair, count) for pair, count in pairs.items() if b"".join(pair) not in ranks]
        if not fresh:
            break
        (left, right), _ = max(fresh, key=lambda item: (item[1], item[0]))
        ranks[left + right] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


@pytest.fixture(scope="session")
def train_ranks():
    """The function above, for tests that need further vocabularies."""
    return _train_ranks


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A .tiktoken file of about 350 ranks; with the control tokens it fits into 600 rows."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.tiktoken"
    write_ranks(_train_ranks(CORPUS, 120), path)
    return path


@pytest.fixture(scope="session")
def config():
    """A Qwen v1 model with context extension, of which no two sizes are equal by accident."""
    return ModelConfig(
        vocab_size=600,
        hidden_size=48,
        num_layers=3,
        num_heads=3,
        head_dim=16,
        ffn_size=40,
        context_length=32,
        rope_theta=10000.0,
        use_dynamic_ntk=True,
        use_logn=True,
    )


@pytest.fixture(scope="session")
def random_params():
    """A function from a configuration to random float32 parameters, biases and norms included."""

    def make(config: ModelConfig, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)
        flat = {
            path: (rng.standard_normal(shape) * 0.1 + ("scale" in path)).astype(np.float32)
            for path, shape in parameter_shapes(config).items()
        }
        return unflatten_dict(flat, sep="/")

    return make


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory, config, random_params, tokenizer_file):
    from qwen_jax.checkpoints.arrays import save_params

    folder = tmp_path_factory.mktemp("saved") / "run"
    save_params(folder, config, random_params(config), str(tokenizer_file))
    return folder


@pytest.fixture
def run_folder(tmp_path, saved_run):
    """A run folder of that model, with the tokenizer: one for each test, as some damage it."""
    return shutil.copytree(saved_run, tmp_path / "run")
