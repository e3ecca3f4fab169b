"""`--check` and `--verify`: equal checkpoints are called equal, and a single changed number is found and named."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.checkpoints import arrays
from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion import convert, converter, load_pretrained
from qwen_jax.conversion.check import compare_logits, streamed_logits
from qwen_jax.conversion.checksums import ChecksumError
from qwen_jax.conversion.load import open_weights
from tests.fakes import outputs

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen1_tiny"


@pytest.mark.parametrize("tied", [False, True])
def test_logits_computed_by_layer_are_those_of_the_model(tmp_path, config, random_params, tied):
    config = dataclasses.replace(config, tie_embeddings=tied, num_kv_heads=1)
    save_params(tmp_path / "run", config, random_params(config), None)
    model, params = load_pretrained(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    expected = outputs(model, params, jnp.asarray(tokens))
    found = streamed_logits(open_weights(tmp_path / "run"), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_conversion_has_the_same_logits(tmp_path, run_folder):
    exact = convert("orbax", run_folder, "qwen2", tmp_path / "exact", progress=False)
    comparison = compare_logits(run_folder, exact)
    assert comparison.same and comparison.agreeing == comparison.positions == 64
    rounded = convert("orbax", run_folder, "qwen2", tmp_path / "rounded", "bfloat16", progress=False)
    comparison = compare_logits(run_folder, rounded)
    assert not comparison.same and 0 < comparison.largest < 0.05 * comparison.scale


def test_one_changed_weight_is_seen(tmp_path):
    folder = convert("qwen", GOLDEN, "qwen2", tmp_path / "out", progress=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    comparison = compare_logits(GOLDEN, folder)
    assert not comparison.same and "differ by" in str(comparison)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="out are not finite"):
        compare_logits(GOLDEN, folder)


@pytest.mark.parametrize("target", ["orbax", "qwen", "qwen2"])
def test_verification_passes_what_was_written(tmp_path, caplog, target):
    caplog.set_level("INFO")
    convert("qwen", GOLDEN, target, tmp_path / "out", progress=False, verify=True)
    assert f"verified: {dict(qwen=19, qwen2=27, orbax=15)[target]} tensors" in caplog.text
    assert (tmp_path / "out").is_dir()


def flip(folder: Path, pattern: str):
    """Changes one bit in the middle of the largest file that matches."""
    file = max(folder.rglob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_verification_names_a_tensor_that_the_disk_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "flush", lambda folder: flip(folder, "*.safetensors"))
    with pytest.raises(ChecksumError, match=r"1 of \d+ tensors .* model\.layers\.\d\.\w+"):
        convert("qwen", GOLDEN, "qwen2", tmp_path / "out", progress=False, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verification_names_a_tensor_that_a_run_folder_lost(tmp_path, monkeypatch):
    whole = arrays.StoredParams.read

    def read(self, path, piece, dtype=None):
        array = whole(self, path, piece).copy()
        if path == "layers/mlp/up/kernel":
            array[0, 0, 0] += 1
        return array

    monkeypatch.setattr(arrays.StoredParams, "read", read)
    with pytest.raises(ChecksumError, match=r"1 of \d+ tensors .* layers/mlp/up/kernel\[0:2\]"):
        convert("qwen", GOLDEN, "orbax", tmp_path / "out", progress=False, verify=True)
    assert list(tmp_path.iterdir()) == []
