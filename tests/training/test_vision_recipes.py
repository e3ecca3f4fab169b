"""Gin files of Qwen-VL's stages: the figures of arXiv 2308.12966 (table 8), and who learns in which stage."""

import re

import flax.linen as nn
import gin
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import qwen_jax.train
from qwen_jax.batch_spec import image_column
from qwen_jax.configuration import load_gin
from qwen_jax.models.build import build_model, parameter_count
from qwen_jax.models.transformer import abstract_params
from qwen_jax.training.optimizer import learning_rates
from qwen_jax.training.parameter_groups import assign_groups, layer_multipliers

gin.configurable(qwen_jax.train.train)

# Peak and last rate, steps, warm-up, samples of a step, size of pictures, tokens of a row.
TABLE = {
    1: (2e-4, 1e-6, 50_000, 500, 30_720, 224, 512),
    2: (5e-5, 1e-5, 19_000, 400, 4_096, 448, 2_048),
    3: (1e-5, 1e-6, 8_000, 3_000, 128, 448, 2_048),
}
# What the paper says was seen: 1.5 billion pairs; 76.8 million samples of seven tasks; 350,000 dialogues.
TASKS = {"captions": 19.7, "vqa": 3.6, "grounding": 3.5, "referring": 8.7, "grounded": 8.7, "ocr": 24.8, "text": 7.8}


def settings(recipe, *bindings):
    """The arguments of `train` of a recipe."""
    load_gin([f"gin/runs/{recipe}.gin"], ["OUTPUT_DIR=runs/x", "INITIAL_CHECKPOINT=runs/base", *bindings])
    found = gin.get_bindings("train")
    places = gin.get_bindings("picture_places")["num_queries"]
    gin.clear_config()
    return found | {"places": places}


def stage(number, size="7b"):
    return settings(f"vl_stage{number}_{size}")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_papers_hyperparameters(number):
    found, (peak, last, steps, warmup, samples, size, length) = stage(number), TABLE[number]
    optimizer, trainer, model = found["optimizer"], found["trainer"], found["model"]
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.05, 1.0)
    assert (trainer.train_steps, trainer.sequence_length) == (steps, length)
    assert model.vision.image_size == size and model.vision.num_queries == found["places"] == 256
    assert parameter_count(model) == 7_721_324_544 + 1_935_610_624 and model.dtype == "bfloat16"
    # The rates as the run reports them: all groups that learn follow one schedule.
    rates = learning_rates(optimizer, steps)
    for made, rate in ((warmup - 1, peak), (warmup, peak), (steps, last)):
        assert all(float(one) == pytest.approx(rate, rel=1e-5) for one in rates(jnp.int32(made)).values())
    assert float(rates(jnp.int32(0))["learning_rate"]) == pytest.approx(peak / warmup, rel=1e-4)
    # Samples of a step: a row is one pair in the first stage, one dialogue in the third, four pictures in the second.
    per_row = found["images_per_row"] if number == 2 else 1
    assert trainer.batch_size * per_row == samples
    assert found["packing"] == ("padded" if number == 3 else "whole")
    assert image_column(found["images_per_row"], size).shape[0] * 258 < length


def test_samples_follow_from_steps_and_batch():
    """By the paper's text: 1.5 billion pairs, the sum of the seven tasks, about three passes over the dialogues."""
    seen = {number: steps * samples for number, (_, _, steps, _, samples, _, _) in TABLE.items()}
    assert seen[1] == pytest.approx(1.5e9, rel=0.03)
    assert seen[2] == pytest.approx(sum(TASKS.values()) * 1e6, rel=0.02)
    assert 2.8 < seen[3] / 350_000 < 3.0


# Of each stage the parameters that learn: the encoder, the resampler, what follows it, the decoder.
LEARNS = {
    1: ("encoder", "resampler", "after"),
    2: ("encoder", "resampler", "after", "decoder"),
    3: ("resampler", "decoder"),
}


def part_of(path: str) -> str:
    if path == "vision/resampler/positions":
        return "sines"
    if not path.startswith("vision/"):
        return "decoder"
    return next((name for name in ("resampler", "output") if path.split("/")[1].startswith(name)), "encoder").replace(
        "output", "after"
    )


@pytest.mark.parametrize("size", ["7b", "tiny"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_learns(number, size):
    found = stage(number, size)
    groups, model = found["optimizer"].groups, build_model(found["model"])
    shapes = nn.meta.unbox(abstract_params(model))
    group_of = assign_groups(list(flatten_dict(shapes, sep="/")), groups)
    parts = {part: {path for path in group_of if part_of(path) == part} for part in set(map(part_of, group_of))}
    assert set(parts) == {"encoder", "resampler", "after", "decoder", "sines"}
    for part, paths in parts.items():
        assert {group_of[path].frozen for path in paths} == {part not in LEARNS[number]}, part
        decays = {0.95} if part == "encoder" and part in LEARNS[number] else {1.0}
        assert {group_of[path].layer_decay for path in paths} == decays, part
    assert all(group.dtype == "float32" for group in groups)  # what is frozen in one stage learns in another


def test_the_first_layers_of_the_encoder_learn_least():
    """BEiT's powers: positions, patches and the norm before the first of n layers have decay^(n + 1)."""
    found = stage(1, "tiny")
    vision = {"vision": nn.meta.unbox(abstract_params(build_model(found["model"])))["vision"]}
    factors = {path: np.ravel(value) for path, value in flatten_dict(layer_multipliers(vision, 0.95), sep="/").items()}
    first = {path for path, value in factors.items() if value == pytest.approx([0.95**5])}
    assert first == {
        "vision/positions",
        "vision/patch_embedding/kernel",
        "vision/input_norm/scale",
        "vision/input_norm/bias",
    }
    np.testing.assert_allclose(factors["vision/layers/up/kernel"], 0.95 ** np.arange(4, 0, -1), rtol=1e-6)
    # Its own positions and input norm are parts of the resampler, which is above all layers.
    assert {float(value[0]) for path, value in factors.items() if not re.match("vision/layers", path)} == {0.95**5, 1.0}
    assert factors["vision/resampler/input_norm/scale"] == 1.0


def test_each_stage_asks_for_the_weights_that_it_starts_from():
    for number in (1, 2, 3):
        with pytest.raises(ValueError, match="INITIAL_CHECKPOINT"):
            load_gin([f"gin/runs/vl_stage{number}_7b.gin"], ["OUTPUT_DIR=runs/x"])
    assert stage(1)["initial_subtree"] == ["token_embedding", "layers", "final_norm", "output"]
    assert [stage(n)["mixture_or_task"] for n in (1, 2, 3)] == ["vision_pairs", "vision_multitask", "vision_chat"]
    assert stage(2)["initial_subtree"] is None and stage(3)["vision_checkpoint"] is None
