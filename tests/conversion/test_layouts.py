"""Layouts of run folders and vocabularies: stacked or per block, padded or cut, laid over a mesh as they are read."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from qwen_jax.checkpoints import arrays
from qwen_jax.checkpoints.arrays import load_params, save_params
from qwen_jax.conversion import convert, load, load_pretrained, load_tokenizer
from qwen_jax.models.config import ModelConfig
from qwen_jax.sharding import MeshConfig, make_mesh


def flat(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten_dict(tree, sep="/").items()}


def assert_equal(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.fixture
def in_pieces(monkeypatch):
    """Parameters of the small model are written in several pieces, as those of a large one are."""
    monkeypatch.setattr(arrays, "PIECE_BYTES", 4000)
    monkeypatch.setattr(load, "PIECE_BYTES", 4000)


def test_orbax_itself_restores_what_was_written_in_pieces(tmp_path, run_folder, in_pieces):
    back = convert("qwen", convert("orbax", run_folder, "qwen", tmp_path / "qwen"), "orbax", tmp_path / "back")
    stored = arrays.StoredParams(back)
    assert stored.stored_together("layers/mlp/up/kernel") == 1 and stored.stored_together("token_embedding") == 20
    assert_equal(ocp.load_checkpointables(back / "checkpoints" / "0")["params"], load_params(run_folder)[1])
    described = ocp.checkpointables_metadata(back / "checkpoints" / "0").metadata["params"]
    shapes = jax.tree.map(np.shape, load_params(run_folder)[1])
    assert jax.tree.map(lambda leaf: tuple(leaf.shape), described) == shapes


def test_each_block_can_have_its_own_arrays(tmp_path, run_folder, config, in_pieces):
    own = convert("orbax", run_folder, "orbax", tmp_path / "own", layout="unscanned", progress=False)
    arrays = ocp.load_checkpointables(own / "checkpoints" / "0")["params"]
    assert sorted(arrays) == ["final_norm", "layers_0", "layers_1", "layers_2", "output", "token_embedding"]
    stacked = load_params(run_folder)[1]
    kernels = arrays["layers_1"]["mlp"]["up"]["kernel"], stacked["layers"]["mlp"]["up"]["kernel"][1]
    np.testing.assert_array_equal(*kernels)
    assert_equal(load_pretrained(own)[1], stacked)
    back = convert("orbax", own, "orbax", tmp_path / "back", progress=False, verify=True)
    assert_equal(load_params(back)[1], stacked)
    with pytest.raises(ValueError, match="layout 'unscanned' cannot be written as qwen2"):
        convert("orbax", own, "qwen2", tmp_path / "out", layout="unscanned")


def test_a_run_folder_of_another_model_is_named(tmp_path, run_folder, config):
    other = dataclasses.replace(config, ffn_size=44)
    (run_folder / "model_config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ValueError) as caught:
        convert("orbax", run_folder, "qwen", tmp_path / "out", progress=False)
    assert "3 of wrong shape: " in str(caught.value)
    assert "layers/mlp/up/kernel is [3, 48, 40], expected [3, 48, 44]" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["qwen", "orbax", "unscanned"])
def test_parameters_go_to_their_devices_as_they_are_read(tmp_path, random_params, in_pieces, source):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, ffn_size=48, head_dim=8, context_length=64
    )
    save_params(tmp_path / "run", config, random_params(config), None)
    folder = tmp_path / "run"
    if source != "orbax":
        options = dict(layout=source) if source == "unscanned" else {}
        target = "orbax" if source == "unscanned" else source
        folder = convert("orbax", folder, target, tmp_path / "out", progress=False, **options)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, params = load_pretrained(folder, mesh=mesh)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 16, 24)}
    assert {shard.data.shape for shard in params["token_embedding"].addressable_shards} == {(32, 16)}
    assert_equal(params, random_params(config))
    assert model.config.dtype == "float32"


def test_a_vocabulary_is_padded_and_cut_past_the_ids_in_use(tmp_path, run_folder, config):
    used = load_tokenizer(run_folder).vocab_size
    assert used < config.vocab_size
    wide = convert("orbax", run_folder, "qwen2", tmp_path / "wide", vocab_size=640, progress=False, verify=True)
    tensors, before = load_file(wide / "model.safetensors"), flat(load_params(run_folder)[1])
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape == (640, 48)
    np.testing.assert_array_equal(tensors["lm_head.weight"][:600], before["output"].T)
    # The last row was padding before, so the model knows what to predict for it.
    np.testing.assert_array_equal(tensors["lm_head.weight"][600:], np.repeat(before["output"].T[-1:], 40, 0))
    back = convert("qwen2", wide, "orbax", tmp_path / "back", vocab_size=600, progress=False)
    assert_equal(load_params(back)[1], load_params(run_folder)[1])
    tight = convert("orbax", run_folder, "orbax", tmp_path / "tight", vocab_size=used, progress=False)
    assert load_params(tight)[0].vocab_size == used
    again = convert("orbax", tight, "orbax", tmp_path / "again", vocab_size=used + 2, progress=False)
    assert not flat(load_params(again)[1])["output"][:, used:].any()
    with pytest.raises(ValueError, match=f"{used - 1} rows would cut ids in use"):
        convert("orbax", run_folder, "qwen", tmp_path / "cut", vocab_size=used - 1, progress=False)
    (run_folder / "tokenizer.tiktoken").unlink()
    with pytest.raises(ValueError, match="has no tokenizer, so which of its 600 vocabulary rows are padding"):
        convert("orbax", run_folder, "qwen", tmp_path / "cut", vocab_size=599, progress=False)
    assert not (tmp_path / "cut").exists()
