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
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.generate import generate
from qwen_jax.models.config import ModelConfig
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import random_vision_run


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
    assert stored.stored_together("layers/mlp/up/kernel") == 1 and stored.stored_together("token_embedding") == 2
    assert_equal(ocp.load_checkpointables(back / "checkpoints" / "0")["params"], load_params(run_folder)[1])
    described = ocp.checkpointables_metadata(back / "checkpoints" / "0").metadata["params"]
    shapes = jax.tree.map(np.shape, load_params(run_folder)[1])
    assert jax.tree.map(lambda leaf: tuple(leaf.shape), described) == shapes


def test_arrays_in_plain_files_are_read(tmp_path, run_folder):
    """Processes without a disk in common write such checkpoints into a bucket."""
    plain = ocp.Context()
    plain.array.saving.use_ocdbt = False
    params = load_params(run_folder)[1]
    with plain:
        ocp.save_checkpointables(run_folder / "checkpoints" / "5", {"params": params})
    assert not (run_folder / "checkpoints" / "5" / "params" / "manifest.ocdbt").exists()
    folder = convert("orbax", run_folder / "checkpoints" / "5", "qwen", tmp_path / "qwen", progress=False)
    assert_equal(load_pretrained(folder)[1], params)
    assert_equal(load_params(run_folder)[1], params)


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


def test_the_tags_of_pictures_are_ids_in_use(tmp_path):
    run = random_vision_run(tmp_path)  # 480 rows for 464 ids and 9 tags
    with pytest.raises(ValueError, match="a vocabulary of 472 rows would cut ids in use: the tokenizer of .* has 473"):
        convert("orbax", run, "orbax", tmp_path / "cut", vocab_size=472, progress=False)
    tight = convert("orbax", run, "orbax", tmp_path / "tight", vocab_size=473, progress=False)
    again = convert("orbax", tight, "orbax", tmp_path / "again", vocab_size=475, progress=False)
    # The last row was that of <imgpad>, which is no padding.
    assert not flat(load_params(again)[1])["token_embedding"][473:].any()


def test_a_model_with_no_more_rows_than_its_tokenizer_has_ids(tmp_path, config, random_params, tokenizer_file):
    """As mergekit and `resize_token_embeddings` make them: 151,665 rows for Qwen2.5, whose control tokens are 22."""
    rows = Tokenizer(tokenizer_file).num_ranks + 22
    config = dataclasses.replace(config, vocab_size=rows, num_kv_heads=3, use_dynamic_ntk=False, use_logn=False)
    save_params(tmp_path / "run", config, random_params(config), tokenizer_file)
    folder = convert("orbax", tmp_path / "run", "qwen2", tmp_path / "qwen2", progress=False)
    assert [entry["id"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]][
        -1
    ] == rows - 1
    (folder / "qwen.tiktoken").unlink()
    back = convert("qwen2", folder, "orbax", tmp_path / "back", progress=False)
    assert_equal(load_params(back)[1], load_params(tmp_path / "run")[1])
    spoken = {
        "".join(generate(checkpoint=one, prompt="the dog", max_new_tokens=12)) for one in (tmp_path / "run", folder)
    }
    assert len(spoken) == 1
    wide = convert("qwen2", folder, "orbax", tmp_path / "wide", vocab_size=640, progress=False)
    assert not flat(load_params(wide)[1])["output"][:, rows:].any()
    pytest.importorskip("gguf", reason="gguf is not installed")
    file = convert("qwen2", folder, "gguf", tmp_path / "model.gguf", progress=False)
    assert load_tokenizer(file).mergeable_ranks == Tokenizer(tokenizer_file).mergeable_ranks
    config = dataclasses.replace(config, vocab_size=rows - 20)
    save_params(tmp_path / "small", config, random_params(config), tokenizer_file)
    with pytest.raises(
        ValueError, match=f"has {rows - 19} ids for text and chat, but the model's vocab_size is {rows - 20}"
    ):
        convert("orbax", tmp_path / "small", "qwen2", tmp_path / "out", progress=False)


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen-7B", "peft_type": "LORA"}')
    for read in (load_pretrained, load_tokenizer):
        with pytest.raises(
            OSError, match="holds a LoRA adapter of Qwen/Qwen-7B, which is no folder here: name the folder"
        ):
            read(tmp_path)


def test_a_step_that_was_not_saved_whole_is_refused(run_folder):
    (run_folder / "checkpoints" / "50").mkdir()
    with pytest.raises(
        ValueError, match=r"checkpoints/50 holds no parameters: .*or name another step: .*checkpoints/0"
    ):
        load_pretrained(run_folder)
    assert load_pretrained(run_folder / "checkpoints" / "0")
