"""Gin files of Code-Qwen and Math-Qwen-Chat: the report's hyperparameters (4 and 5), from the right weights."""

import gin
import pytest

import qwen_jax.train
from qwen_jax.configuration import load_gin
from qwen_jax.models.build import parameter_count

gin.configurable(qwen_jax.train.train)

PARAMETERS = {"7b": 7_721_324_544, "14b": 14_167_290_880}


def settings(recipe, *bindings):
    """The arguments of `train` of a recipe."""
    load_gin([f"gin/runs/{recipe}.gin"], ["OUTPUT_DIR=runs/x", *bindings])
    found = gin.get_bindings("train")
    gin.clear_config()
    return found


def three_percent(steps):
    """Rounded up."""
    return -(-3 * steps // 100)


def check_adamw(optimizer):
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)


@pytest.mark.parametrize(("size", "rate"), [("7b", 3e-5), ("14b", 6e-5)])
def test_the_reports_hyperparameters_of_code_qwen(size, rate):
    found = settings(f"code_{size}", "INITIAL_CHECKPOINT=runs/base")
    optimizer, trainer, model = found["optimizer"], found["trainer"], found["model"]
    assert (optimizer.peak_learning_rate, optimizer.schedule) == (rate, "constant")
    assert optimizer.warmup_steps == three_percent(trainer.train_steps)
    check_adamw(optimizer)
    assert trainer.sequence_length == model.context_length == 8192
    assert trainer.train_steps * trainer.batch_size * 8192 == pytest.approx(90e9, rel=1e-4)
    # The flash kernels are chosen where there are any, and nothing rules them out.
    assert model.attention_kernel == "auto" and model.attention_dropout == 0 and model.dtype == "bfloat16"
    assert parameter_count(model) == PARAMETERS[size]
    assert found["mixture_or_task"] == "code_and_text" and found["packing"] == "concat"


@pytest.mark.parametrize(("size", "rate"), [("7b", 1e-5), ("14b", 2e-6)])
def test_the_reports_hyperparameters_of_code_qwen_chat(size, rate):
    found = settings(f"code_sft_{size}", "INITIAL_CHECKPOINT=runs/code")
    optimizer, trainer, model = found["optimizer"], found["trainer"], found["model"]
    assert (optimizer.peak_learning_rate, optimizer.schedule) == (rate, "constant")
    assert optimizer.warmup_steps == three_percent(trainer.train_steps)
    check_adamw(optimizer)
    assert trainer.sequence_length == model.context_length == 8192
    assert parameter_count(model) == PARAMETERS[size]
    assert found["mixture_or_task"] == "chat_messages" and found["packing"] == "whole"


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_the_reports_hyperparameters_of_math_qwen_chat(size):
    found = settings(f"math_sft_{size}", "INITIAL_CHECKPOINT=runs/base")
    optimizer, trainer, model = found["optimizer"], found["trainer"], found["model"]
    assert (optimizer.peak_learning_rate, trainer.train_steps, trainer.sequence_length) == (2e-5, 50_000, 1024)
    check_adamw(optimizer)
    sft = settings(f"sft_{size}", "INITIAL_CHECKPOINT=runs/base")
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.warmup_steps) == (
        sft["optimizer"].weight_decay,
        sft["optimizer"].clip_norm,
        sft["optimizer"].warmup_steps,
    )
    assert trainer.batch_size == sft["trainer"].batch_size and model == sft["model"]
    assert found["mixture_or_task"] == "math_instructions" and found["packing"] == "whole"


def test_each_recipe_asks_for_the_weights_that_it_starts_from():
    for recipe in ("code_7b", "code_14b", "code_sft_7b", "code_sft_14b", "math_sft_7b", "math_sft_14b"):
        with pytest.raises(ValueError, match="INITIAL_CHECKPOINT is not set"):
            settings(recipe)
    assert settings("code_tiny")["initial_checkpoint"] == "runs/specialists/base"
    assert settings("code_sft_tiny")["initial_checkpoint"] == "runs/specialists/code"
    assert settings("math_sft_tiny")["initial_checkpoint"] == "runs/specialists/base"


@pytest.mark.parametrize("recipe", ["code_tiny", "code_sft_tiny"])
def test_the_tiny_recipes_keep_the_reports_share_of_warm_up(recipe):
    found = settings(recipe)
    optimizer = found["optimizer"]
    assert optimizer.schedule == "constant"
    assert optimizer.warmup_steps == three_percent(found["trainer"].train_steps)
