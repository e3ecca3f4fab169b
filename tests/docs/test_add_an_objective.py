"""docs/how_to/add_an_objective.md: its function and its gin file make an objective that computes what they say."""

import sys

import flax.linen as nn
import gin
import jax
import numpy as np
import pytest

from qwen_jax import train
from qwen_jax.configuration import load_gin
from qwen_jax.models.transformer import Qwen
from qwen_jax.training.objectives import next_token_loss
from tests.fakes import FakeExamples, small_model
from tests.pages import blocks


def test_the_objective_of_the_page_adds_its_penalty_and_reports_it(tmp_path, monkeypatch):
    texts = dict(blocks("add_an_objective.md"))
    (tmp_path / "my_objectives.py").write_text(texts["python"])
    (tmp_path / "penalized.gin").write_text(texts["gin"])
    monkeypatch.syspath_prepend(tmp_path)
    gin.configurable(train.train)
    load_gin([str(tmp_path / "penalized.gin")], ["OUTPUT_DIR=runs/penalized"])
    objective = gin.get_bindings("train")["objective"]
    gin.clear_config()
    sys.modules.pop("my_objectives")
    model, batch = Qwen(small_model()), FakeExamples().read(0, 4)
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    total, sums = jax.jit(lambda params: objective.loss(model, params, batch, None))(params)
    plain, _ = jax.jit(lambda params: next_token_loss(model, params, batch, None))(params)
    penalty = 0.1 * float((np.asarray(params["output"]) ** 2).mean())
    assert float(total) == pytest.approx(float(plain + sums["penalty"]), rel=1e-6)
    assert float(sums["penalty"]) == pytest.approx(penalty * float(sums["weight"]), rel=1e-5)
    metrics = objective.summarize({name: float(value) for name, value in sums.items()})
    assert metrics["penalty"] == pytest.approx(penalty, rel=1e-5) and 0 <= metrics["accuracy"] <= 1
