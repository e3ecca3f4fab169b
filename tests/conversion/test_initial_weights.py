"""Weights that a run starts from: every format, whole and in part, and every misfit named with both shapes."""

import dataclasses

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen_jax import train
from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.checkpoints.run_folder import CheckpointError
from qwen_jax.configuration import load_gin
from qwen_jax.conversion import InitialWeights, convert, read_model_config
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import MeshConfig, make_mesh, tree_shardings
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.trainer_config import TrainerConfig

gin.configurable(train.train)
FORMATS = ("orbax", "unscanned", "qwen", "qwen2", "gguf")


def abstract_of(config, dtype=jnp.float32):
    boxed = abstract_params(Qwen(config))
    shardings = tree_shardings(boxed, make_mesh(MeshConfig(fsdp=3, tensor=1), jax.devices()[:3]))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )


def written(run_folder, tmp_path, form):
    if form == "orbax":
        return run_folder
    if form == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    target, layout = ("orbax", {"layout": "unscanned"}) if form == "unscanned" else (form, {})
    return convert("orbax", run_folder, target, tmp_path / f"out.{form}", progress=False, **layout)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_starts_a_run_with_another_context_length(run_folder, tmp_path, config, form):
    path = written(run_folder, tmp_path, form)
    longer = dataclasses.replace(config, context_length=4096, embedding_dropout=0.1, dtype="bfloat16")
    dtype = jnp.bfloat16 if form == "qwen2" else jnp.float32
    abstract, expected = abstract_of(longer, dtype), flatten_dict(load_params(run_folder)[1], sep="/")
    weights = InitialWeights(path)
    weights.check(abstract)
    for name, leaf in flatten_dict(weights.load(abstract), sep="/").items():
        wanted = flatten_dict(abstract, sep="/")[name]
        assert leaf.sharding == wanted.sharding and leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), expected.pop(name).astype(dtype), err_msg=name)
    assert not expected


def test_a_part_of_the_weights_is_taken(run_folder, config):
    flat = flatten_dict(abstract_of(config), sep="/")
    expected = flatten_dict(load_params(run_folder)[1], sep="/")
    # A reward model: a base without its output, and a head of its own.
    reward = {path: leaf for path, leaf in flat.items() if path != "output"}
    reward["score/kernel"] = jax.ShapeDtypeStruct((48, 1), jnp.float32)
    weights = InitialWeights(run_folder, ["layers", "token_embedding", "final_norm"])
    weights.check(unflatten_dict(reward, sep="/"))
    loaded = flatten_dict(weights.load(unflatten_dict(reward, sep="/")), sep="/")
    assert set(loaded) == set(reward) - {"score/kernel"} and "layers, token_embedding, final_norm" in str(weights)
    # The decoder of a larger model, below another path.
    larger = {f"decoder/{path}": leaf for path, leaf in flat.items()}
    larger["encoder/kernel"] = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    loaded = flatten_dict(InitialWeights(run_folder, {"decoder": ""}).load(unflatten_dict(larger, sep="/")), sep="/")
    assert set(loaded) == set(larger) - {"encoder/kernel"}
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path.removeprefix("decoder/")], err_msg=path)


@pytest.mark.parametrize(
    ("changes", "subtree", "messages"),
    [
        (
            {"num_layers": 2, "ffn_size": 44},
            None,
            (
                r"layers/mlp/up/kernel is \[3, 48, 40\] there and \[2, 48, 44\] in the model",
                r"layers/mlp_norm/scale is \[3, 48\] there and \[2, 48\] in the model",
            ),
        ),
        ({"tie_embeddings": True}, None, (r"output \[48, 600\] is there and not in the model",)),
        ({"vocab_size": 640}, "token_embedding", (r"token_embedding is \[600, 48\] there and \[640, 48\]",)),
        ({}, ["layers/mpl"], ("the model has no parameter layers/mpl",)),
        ({}, {"layers/mlp": "mlp"}, (r"layers/mlp/up/kernel \(there mlp/up/kernel\) \[3, 48, 40\] is not there",)),
    ],
)
def test_every_misfit_is_named_with_both_shapes(run_folder, config, changes, subtree, messages):
    abstract = abstract_of(dataclasses.replace(config, **changes))
    for call in (InitialWeights(run_folder, subtree).check, InitialWeights(run_folder, subtree).load):
        for message in messages:
            with pytest.raises(CheckpointError, match=message):
                call(abstract)


def test_another_rotary_base_is_a_warning(run_folder, config, caplog):
    with caplog.at_level("WARNING"):
        InitialWeights(run_folder, model=dataclasses.replace(config, rope_theta=1e6)).check(abstract_of(config))
    assert "rope_theta 10000.0, and this run computes with 1000000.0" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "nowhere is not a folder"), ("run", r"token_embedding is \[600, 48\] there")]
)
def test_a_bad_checkpoint_is_refused_before_data_and_compiling(run_folder, tmp_path, config, path, message):
    with pytest.raises((OSError, ValueError), match=message):
        train.train(
            model=dataclasses.replace(config, vocab_size=640),
            optimizer=OptimizerConfig(1e-3),
            trainer=TrainerConfig(train_steps=1, batch_size=8, sequence_length=16),
            mixture_or_task="a task that does not exist",
            output_dir=str(tmp_path / "new"),
            cache_dir=str(tmp_path / "cache"),
            initial_checkpoint=str(tmp_path / path),
        )


@pytest.mark.parametrize("form", FORMATS)
def test_the_configuration_comes_with_the_weights(run_folder, tmp_path, config, form):
    path = written(run_folder, tmp_path, form)
    read = read_model_config(path)
    assert (read.num_layers, read.ffn_size, read.context_length) == (3, 40, 32)
    files = ["gin/hardware/v5e_16.gin", "gin/runs/continue.gin"]
    changes = ["OUTPUT_DIR=x", f"INITIAL_CHECKPOINT={path}", "ModelConfig.context_length=64", "SEQUENCE_LENGTH=64"]
    load_gin(files, [*changes, "EMBEDDING_DROPOUT=0.1"])
    settings = gin.get_bindings("train")
    model = settings["model"]
    assert model == dataclasses.replace(
        read, context_length=64, embedding_dropout=0.1, remat="none", attention_blocks=model.attention_blocks
    )
    assert model.attention_blocks.backward_key == 1024 and settings["trainer"].tokens_per_device == 8192
