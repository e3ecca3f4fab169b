"""docs/how_to/parameter_groups.md: its gin file configures what it says, its paths and fields are those in use."""

import dataclasses
import re

import flax.linen as nn
import gin
import jax
import pytest

from qwen_jax import train
from qwen_jax.configuration import load_gin
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.training.parameter_groups import ParameterGroup, path_name, split_params
from tests.fakes import small_model
from tests.pages import blocks


@pytest.fixture
def page(root):
    return (root / "docs/how_to/parameter_groups.md").read_text()


def named(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_the_gin_file_of_the_page_trains_the_top_alone(tmp_path):
    text = next(text for language, text in blocks("parameter_groups.md") if language == "gin")
    (tmp_path / "top.gin").write_text(text)
    gin.configurable(train.train)
    load_gin(["gin/runs/pretrain_tiny.gin", str(tmp_path / "top.gin")], ["OUTPUT_DIR=runs/top"])
    groups = gin.get_bindings("OptimizerConfig", resolve_references=True)["groups"]
    gin.clear_config()
    trained, frozen = split_params(nn.meta.unbox(abstract_params(Qwen(small_model()))), groups)
    assert named(trained) == ["final_norm/scale", "output"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}


def test_the_paths_of_the_page_are_those_of_the_decoder(page):
    listed = next(text for language, text in blocks("parameter_groups.md") if language == "text")
    shown = set(re.findall(r"[\w/]+(?:_embedding|/kernel|/bias|/scale)|^output$", listed, re.MULTILINE))
    for one in ("key", "value"):
        shown |= {f"layers/attention/{one}/kernel", f"layers/attention/{one}/bias"}
    assert shown == set(named(nn.meta.unbox(abstract_params(Qwen(small_model())))))


def test_the_fields_of_the_page_are_those_of_a_group(page):
    shown = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert shown == [field.name for field in dataclasses.fields(ParameterGroup)]
