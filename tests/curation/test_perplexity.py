"""A checkpoint as a score: the interface that curation sees, and the number that the logits give."""

import os
import subprocess

import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.perplexity import CheckpointPerplexity
from tests.fakes import outputs_of_row, random_run
from tests.warm_python import python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model over a vocabulary of single bytes."""
    sizes = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=128)
    return random_run(tmp_path_factory.mktemp("perplexity"), **sizes)


@pytest.mark.parametrize("text", ["ab", "def add(a, b):\n    return a + b\n" * 2, "你好，世界" * 30])
def test_the_score_is_the_perplexity_of_the_logits(checkpoint, text):
    model, params = load_pretrained(checkpoint)
    ids = np.array(load_tokenizer(checkpoint).encode(text))[:100]
    logits = np.asarray(outputs_of_row(model, params, ids, 100))
    losses = np.log(np.exp(logits[:-1]).sum(axis=-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    scorer = CheckpointPerplexity(str(checkpoint), max_tokens=100)
    assert scorer(text) == pytest.approx(float(np.exp(losses.mean())), rel=1e-3)


def test_what_has_no_perplexity(checkpoint):
    assert CheckpointPerplexity(str(checkpoint), max_tokens=10)("") == float("inf")
    with pytest.raises(ValueError, match="max_tokens is 300, expected 2…128"):
        CheckpointPerplexity(str(checkpoint), max_tokens=300)("text")


def test_curation_by_a_checkpoint(checkpoint, crawl, tmp_path, root):
    done = subprocess.run(
        [
            python(),
            str(root / "tools" / "curate.py"),
            f"--input=books={crawl}/books",
            f"--output={tmp_path}/out",
            f"--config={root}/gin/curation/with_checkpoint.gin",
            f"--gin.CHECKPOINT={checkpoint}",
            "--gin.CheckpointPerplexity.max_tokens=32",
            "--gin.model_perplexity/ScoreFilter.maximum=1.0",
        ],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    manifest = (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    assert "max_model_perplexity" in manifest  # no text is that probable
