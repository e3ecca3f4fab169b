"""What a compiled step needs: collectives counted as often as they run, memory, operations against a known model."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.models.build import build_model, parameter_count
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.models.vision.encoder import VisionEncoder
from qwen_jax.programs.account import collectives_per_device
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.parameter_groups import ParameterGroup, ScheduleConfig
from qwen_jax.training.program import (
    TooLittleMemory,
    check_run,
    compile_run,
    frozen_parts,
    image_flops,
    least_between_slices,
    least_collectives,
    memory_per_device,
    model_flops_per_token,
    trained_count,
)
from tests.fakes import small_model


def compiled(layout, **changes):
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    return compile_run(
        Qwen(small_model(**changes)),
        next_token_prediction(),
        OptimizerConfig(1e-3),
        10,
        mesh,
        batch_size=8,
        columns=token_columns(16),
    )


def test_one_device_needs_no_collective_and_copies_no_state():
    program = compiled((1, 1, 1))
    assert collectives_per_device(program.as_text()) == {}
    memory = memory_per_device(program)
    state_bytes = 3 * 4 * parameter_count(small_model())
    assert memory["arguments"] >= memory["aliased"] >= state_bytes
    assert memory["need"] == memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]


def test_data_parallel_training_only_reduces():
    found = collectives_per_device(compiled((8, 1, 1)).as_text())
    assert set(found) == {"all-reduce"}
    # Each gradient once, in float32; little else.
    gradients = 4 * parameter_count(small_model())
    assert gradients <= found["all-reduce"].payload_bytes <= 1.1 * gradients


def test_collectives_inside_the_layer_loop_count_once_per_layer():
    """More layers, more gathered bytes, although the program's text does not grow."""
    programs = [compiled((1, 8, 1), num_layers=layers) for layers in (2, 6)]
    shallow, deep = (collectives_per_device(program.as_text())["all-gather"].payload_bytes for program in programs)
    per_layer = 4 * (parameter_count(small_model(num_layers=3)) - parameter_count(small_model(num_layers=2)))
    assert 0.9 * 4 * per_layer <= deep - shallow <= 4 * 4 * per_layer


def test_fully_sharded_training_moves_no_tokens_between_devices():
    found = collectives_per_device(compiled((1, 8, 1)).as_text())
    assert "all-to-all" not in found and "collective-permute" not in found


@pytest.mark.parametrize(("causal", "gflop"), [(True, 44.20), (False, 45.82)])
def test_operations_of_the_7b_model(causal, gflop):
    """6 x (7,721,324,544 - 151,936 x 4,096 looked-up rows), and 12 x 32 layers x 4,096 x 2,048 keys or half of them."""
    config = ModelConfig(vocab_size=151_936, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=11_008)
    flops = model_flops_per_token(config, 2048, causal)
    assert flops.matmuls == 6 * (7_721_324_544 - 151_936 * 4096)
    assert flops.attention == 12 * 32 * 4096 * 2048 / (2 if causal else 1)
    assert flops.total / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"), [({"xla_tpu_nonsense": 1}, "xla_tpu_nonsense"), ({"xla_cpu_enable_fast_math": "x"}, "bool")]
)
def test_options_that_the_compiler_does_not_take_are_refused(options, message):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with pytest.raises(ValueError, match=message):
        compile_run(
            Qwen(small_model()),
            next_token_prediction(),
            OptimizerConfig(1e-3),
            10,
            mesh,
            batch_size=8,
            columns=token_columns(16),
            compiler_options=options,
        )


def test_a_state_that_cannot_fit_is_refused_before_compiling():
    """14 bytes a parameter, split over fsdp; a byte too little is too little."""
    mesh = make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])
    model, shape = Qwen(small_model()), {"batch_size": 8, "columns": token_columns(16)}
    needed = check_run(model, OptimizerConfig(1e-3), 10, mesh, **shape)
    parameters = parameter_count(model.config)
    assert 14 * parameters / 8 <= sum(needed.values()) <= 1.2 * 14 * parameters / 8
    check_run(model, OptimizerConfig(1e-3), 10, mesh, memory=sum(needed.values()), **shape)
    with pytest.raises(TooLittleMemory, match=f"{parameters:,} parameters needs .* on each of 8 device"):
        check_run(model, OptimizerConfig(1e-3), 10, mesh, memory=sum(needed.values()) - 1, **shape)


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ((1, 1, 1), set()),
        ((8, 1, 1), {"all-reduce"}),
        ((1, 8, 1), {"all-gather", "reduce-scatter"}),
        ((2, 2, 2), {"all-gather", "reduce-scatter", "all-reduce"}),
    ],
)
def test_no_program_moves_less_than_its_layout_needs(layout, kinds):
    """The least, in float32 here, is what the compiled step moves at least, and not far from what it moves."""
    config = small_model(hidden_size=64, ffn_size=256)
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    least = least_collectives(config, mesh, tokens=8 * 16)
    assert set(least) == kinds
    program = compile_run(
        Qwen(config), next_token_prediction(), OptimizerConfig(1e-3), 10, mesh, batch_size=8, columns=token_columns(16)
    )
    moved = sum(total.wire_bytes for total in collectives_per_device(program.as_text()).values())
    needed = sum(total.wire_bytes for total in least.values())
    assert 0.95 * needed <= moved <= 4 * needed


def test_the_least_of_7b_on_256_chips():
    config = ModelConfig(vocab_size=151_936, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=11_008)
    mesh = jax.sharding.AbstractMesh((1, 256, 1), ("data", "fsdp", "tensor"))
    least = least_collectives(config, mesh, 2048 * 2048)
    gathered = 2 * (2 * 7_721_324_544 - 2 * 151_936 * 4096)
    assert least["all-gather"].payload_bytes == gathered
    assert least["reduce-scatter"].payload_bytes == 2 * 7_721_324_544
    two_slices = jax.sharding.AbstractMesh((2, 64, 1), ("data", "fsdp", "tensor"))
    assert least_between_slices(config, two_slices, 2) == 2 * 7_721_324_544 / 64
    assert least_between_slices(config, mesh, 1) == 0
    # Frozen parameters are gathered as before; they have no gradients to send.
    frozen = least_collectives(config, mesh, 2048 * 2048, trained=1_000_000)
    assert frozen["all-gather"] == least["all-gather"] and frozen["reduce-scatter"].payload_bytes == 2 * 1_000_000
    assert least_between_slices(config, two_slices, 2, trained=1_000_000) == 2 * 1_000_000 / 64


def test_frozen_parameters_are_not_counted_as_trained():
    config = small_model()
    groups = (ParameterGroup("frozen", "layers/.*", None), ParameterGroup("rest", ".*", ScheduleConfig(1e-3)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    count = functools.partial(trained_count, Qwen(config), train_steps=10, mesh=mesh)
    assert count(OptimizerConfig(1e-3)) == parameter_count(config)
    assert count(OptimizerConfig(1e-3, groups=groups)) == (2 * config.vocab_size + 1) * config.hidden_size


def test_operations_of_pictures_are_those_that_xla_counts():
    """Products only, so a little less; forward alone, and with the gradients of all parameters."""
    vision = VisionConfig(
        image_size=64, patch_size=4, width=128, num_layers=1, num_heads=2, mlp_size=512, num_queries=16
    )
    config = small_model(hidden_size=256, head_dim=64, vision=vision)
    encoder, images = VisionEncoder(config, vision), jax.ShapeDtypeStruct((8, 64, 64, 3), "float32")
    params = jax.eval_shape(lambda: nn.meta.unbox(build_model(config).init_params(jax.random.key(0))))["vision"]

    def total(params, images):
        return encoder.apply({"params": params}, images).sum()

    for function, passes in ((total, 1), (jax.grad(total), 3)):
        counted = jax.jit(function).lower(params, images).cost_analysis()["flops"] / 8
        resampler = image_flops(config, 0) / 3
        expected = image_flops(config, passes) - (3 - passes) * resampler
        assert expected == pytest.approx(counted, rel=0.06) and expected < 1.01 * counted


def test_what_is_frozen_has_no_operations_of_its_gradients():
    vision = VisionConfig(image_size=28, patch_size=14, width=32, num_layers=1, num_heads=2, mlp_size=48, num_queries=4)
    config = small_model(hidden_size=128, vision=vision)
    rest = ParameterGroup("rest", ".*", ScheduleConfig(1e-3))
    encoder = ParameterGroup("encoder", "vision/(?!resampler).*", None)
    decoder = ParameterGroup("decoder", "(?!vision).*", None)
    found = {
        name: frozen_parts(build_model(config), OptimizerConfig(1e-3, groups=groups))
        for name, groups in {"none": (), "encoder": (encoder, rest), "decoder": (decoder, rest)}.items()
    }
    assert found == {"none": set(), "encoder": {"encoder"}, "decoder": {"decoder"}}
    flops = {name: model_flops_per_token(config, 32, images_per_row=2, frozen=parts) for name, parts in found.items()}
    text = model_flops_per_token(dataclasses.replace(config, vision=None), 32)
    assert flops["none"].matmuls == text.matmuls == flops["encoder"].matmuls == 1.5 * flops["decoder"].matmuls
    assert flops["none"].images == 2 * image_flops(config) / 32 == flops["decoder"].images
    assert flops["none"].total - flops["encoder"].total == 4 / 32 * (image_flops(config) - image_flops(config, 2))
    assert model_flops_per_token(config, 32) == text
