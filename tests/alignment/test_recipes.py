"""Gin files of preference models and DPO: the report's and the paper's hyperparameters, from the right weights."""

import gin
import pytest

import qwen_jax.train
from qwen_jax.configuration import load_gin
from qwen_jax.models.build import parameter_count

gin.configurable(qwen_jax.train.train)


def settings(recipe, *bindings):
    """The arguments of `train` of a recipe."""
    load_gin([f"gin/runs/{recipe}.gin"], ["OUTPUT_DIR=runs/x", *bindings])
    found = gin.get_bindings("train")
    gin.clear_config()
    return found


@pytest.mark.parametrize("size", ["7b", "14b"])
@pytest.mark.parametrize("stage", ["pmp", "reward"])
def test_the_reports_hyperparameters_of_preference_models(stage, size):
    found = settings(f"{stage}_{size}", "INITIAL_CHECKPOINT=runs/before")
    optimizer, trainer, model = found["optimizer"], found["trainer"], found["model"]
    assert (optimizer.peak_learning_rate, optimizer.schedule, optimizer.warmup_steps) == (3e-6, "constant", 0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert found["epochs"] == 1 and found["packing"] == "whole" and model.head == "scalar"
    assert trainer.sequence_length == 2048 <= model.context_length
    # Without output projection, with one number for each of the width.
    rows = {"7b": 151_936, "14b": 152_064}[size]
    whole = {"7b": 7_721_324_544, "14b": 14_167_290_880}[size]
    assert parameter_count(model) == whole - (rows - 1) * model.hidden_size
    parts = ["token_embedding", "layers", "final_norm"]
    assert found["initial_subtree"] == (parts if stage == "pmp" else None)


@pytest.mark.parametrize("size", ["tiny", "7b", "14b"])
def test_dpo_takes_the_initial_weights_as_its_reference_unless_another_is_named(size):
    found = settings(f"dpo_{size}", "INITIAL_CHECKPOINT=runs/sft")
    assert found["reference"].checkpoint == found["initial_checkpoint"] == "runs/sft"
    assert found["model"].head == "tokens" and found["epochs"] == 1
    if size != "tiny":
        assert (found["optimizer"].peak_learning_rate, found["optimizer"].warmup_steps) == (1e-6, 150)
    other = settings(f"dpo_{size}", "INITIAL_CHECKPOINT=runs/sft", "REFERENCE_CHECKPOINT=runs/other", "BETA=0.3")
    assert other["reference"].checkpoint == "runs/other" and other["initial_checkpoint"] == "runs/sft"


def test_recipes_ask_for_the_weights_that_they_start_from():
    for recipe in ("pmp_7b", "reward_14b", "dpo_7b"):
        with pytest.raises(ValueError, match="INITIAL_CHECKPOINT is not set"):
            settings(recipe)
    assert settings("reward_tiny")["initial_checkpoint"] == "runs/pmp_tiny"
