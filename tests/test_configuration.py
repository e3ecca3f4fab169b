"""Gin files and flags: what is set arrives, and every mistake gets one short line that says how to mend it."""

import argparse

import gin
import pytest

import qwen_jax.train  # noqa: F401  registers what the run files configure
from qwen_jax.configuration import ConfigurationError, load_gin, parse_args

gin.configurable(qwen_jax.train.train)
TINY = ["gin/models/tiny.gin", "gin/runs/pretrain.gin"]


def loop(*bindings):
    load_gin(TINY, ["OUTPUT_DIR=/tmp/run", *bindings])
    return gin.get_configurable("TrainerConfig")()


def test_flags_override_files_and_need_no_quotes():
    assert loop().train_steps == 400
    assert loop("TRAIN_STEPS=7").train_steps == 7
    assert loop("TrainerConfig.seed=5").seed == 5
    loop("OUTPUT_DIR=runs/with space/x-1.0", "MIXTURE_OR_TASK=local_files")
    assert gin.query_parameter("OUTPUT_DIR/gin.macro.value") == "runs/with space/x-1.0"


@pytest.mark.parametrize(
    ("size", "steps", "rate"), [("1_8b", 524_521, 3e-4), ("7b", 572_205, 3e-4), ("14b", 715_256, 3e-4)]
)
def test_the_reports_hyperparameters_come_with_the_size(size, steps, rate):
    load_gin([f"gin/models/{size}.gin", "gin/runs/pretrain.gin"], ["OUTPUT_DIR=x"])
    made, optimizer = gin.get_configurable("TrainerConfig")(), gin.get_configurable("OptimizerConfig")()
    assert made.train_steps == steps and made.batch_size * made.sequence_length == 4_194_304
    assert optimizer.peak_learning_rate == rate
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert optimizer.schedule == "cosine" and optimizer.final_fraction == 0.1
    model = gin.get_configurable("ModelConfig")()
    assert model.dtype == "bfloat16" and model.context_length >= made.sequence_length


@pytest.mark.parametrize(
    ("files", "bindings", "message"),
    [
        (TINY, [], "OUTPUT_DIR is not set: add --gin.OUTPUT_DIR=VALUE"),
        (TINY[1:], ["OUTPUT_DIR=x"], "MODEL_SIZE is not set: add --gin_file=FILE with a file of gin/models"),
        (TINY, ["OUTPUT_DIR=x", "TRAIN_STEP=5"], "nothing in the gin files uses TRAIN_STEP.*Did you mean TRAIN_STEPS"),
        (TINY, ["OUTPUT_DIR=x", "OptimiserConfig.beta1=0.5"], "OptimiserConfig.*Did you mean OptimizerConfig"),
        (TINY, ["OUTPUT_DIR=x", "OptimizerConfig.beta3=0.5"], "beta3.*Did you mean beta2"),
        (TINY, ["OUTPUT_DIR=x", "ModelConfig.remate=full"], "remate.*Did you mean remat"),
        (TINY, ["OUTPUT_DIR=x", "TRAIN_STEPS"], "expected --gin.NAME=VALUE"),
        (["gin/models/tinny.gin"], [], "tinny.gin: no such file.*Did you mean gin/models/tiny.gin"),
        ([], ["OUTPUT_DIR=x"], "was a --gin_file forgotten"),
    ],
)
def test_mistakes_are_named(files, bindings, message):
    with pytest.raises(ConfigurationError, match=message):
        load_gin(files, bindings)


def test_a_size_without_a_value_says_which_macro_to_set():
    load_gin(["gin/models/72b.gin", TINY[1]], ["OUTPUT_DIR=x"])
    with pytest.raises(ValueError, match="no value for MODEL_SIZE '72b'"):
        gin.get_configurable("TrainerConfig")()


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.gin").write_text("TrainerConfig.seed = \n")
    with pytest.raises(ConfigurationError, match="bad.gin"):
        load_gin([str(tmp_path / "bad.gin")])


def test_help_tells_of_gin(capsys):
    with pytest.raises(SystemExit):
        parse_args(argparse.ArgumentParser(), ["--help"])
    assert "--gin.NAME=VALUE" in capsys.readouterr().out
