"""`qwen_jax.inference.logits`, and generation past the training length."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained
from qwen_jax.inference import Engine, Request, logits
from qwen_jax.models.transformer import Qwen
from tests.fakes import outputs

TINY = Path(__file__).parents[1] / "golden" / "qwen1_tiny"


@pytest.fixture(scope="module")
def tiny():
    """A model of training length 16, with dynamic NTK and LogN."""
    return load_pretrained(TINY)


def test_it_takes_what_numpy_has_and_agrees_with_training_below_the_training_length(tiny):
    model, params = tiny
    tokens = np.arange(26).reshape(2, 13)
    found = logits(model, params, tokens)
    assert found.shape == (2, 13, 64) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, outputs(model, params, jnp.asarray(tokens)), atol=1e-5)


def test_a_padded_row_is_what_it_is_alone(tiny):
    """33 and 20 tokens: the one has alpha 7, the other 3, whatever padding they come with."""
    model, params = tiny
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    together = logits(model, params, tokens, lengths=[33, 20])
    for row, length in enumerate((33, 20)):
        alone = logits(model, params, tokens[row : row + 1, :length])
        np.testing.assert_allclose(together[row, :length], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], None, r"found int32 \[2\]"),
        ([[1.0]], None, "found float32"),
        (np.zeros((1, 0), int), None, r"\[1, 0\]"),
        ([[1, 2]], [1, 2], r"lengths must be integers \[1\]"),
    ],
)
def test_other_shapes_and_kinds_are_refused(tiny, tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        logits(*tiny, tokens, lengths)


def test_generation_stops_at_eight_training_lengths_and_at_one_without_dynamic_ntk(tiny):
    model, params = tiny
    prompt = list(range(20))
    (result,) = Engine(model, params).generate([Request(prompt, 108)])
    assert len(result.tokens) == 108
    with pytest.raises(
        ValueError, match="at most 128 tokens, which dynamic NTK makes of the model's context_length of 16"
    ):
        Engine(model, params).stream(Request(prompt, 109))
    without = Qwen(dataclasses.replace(model.config, use_dynamic_ntk=False))
    with pytest.raises(ValueError, match="at most 16 tokens, the model's context_length of 16"):
        Engine(without, params).stream(Request(prompt, 1))
