"""Outputs of the released modeling code on small random models, against ours (golden files; see their config.json)."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained
from tests.fakes import outputs

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden"
FOLDERS = {
    "tiny": ROOT / "tests" / "golden" / "qwen1_tiny",
    "small": SHARED / "qwen1_small",
    "plain": SHARED / "qwen1_plain",
}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    """(model, params, expected arrays) of one golden model."""
    folder = FOLDERS[request.param]
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} at {folder.parent}: set QWEN_JAX_SHARED to the folder that holds golden/")
    model, params = load_pretrained(folder)
    return model, params, np.load(folder / "expected.npz")


def test_logits(golden):
    """Where neither NTK nor LogN acts, training mode is what the released code computes."""
    model, params, expected = golden
    extended = model.config.use_dynamic_ntk or model.config.use_logn
    lengths = [int(name.removeprefix("ids_")) for name in expected if name.startswith("ids_")]
    lengths = [n for n in lengths if n <= model.config.context_length or not extended]
    assert lengths
    for length in lengths:
        logits = outputs(model, params, expected[f"ids_{length}"])[:, -8:]
        wanted = expected[f"logits_{length}"]
        worst = np.abs(np.asarray(logits) - wanted).max() / np.abs(wanted).max()
        assert worst < 1e-4, f"{length} tokens: {worst:.1e} of the logits' scale"


def test_loss_and_gradient_norm(golden):
    model, params, expected = golden
    tokens = jnp.asarray(expected["train_ids"])

    def loss(params):
        logits = model.apply({"params": params}, tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert abs(value / expected["train_loss"] - 1) < 1e-5
    assert abs(norm / expected["train_grad_norm"] - 1) < 1e-4
