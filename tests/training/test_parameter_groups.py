"""Groups of parameters against torch's, frozen trees that cost nothing and stay as they are, errors by name."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.checkpoints.arrays import StoredParams, load_params
from qwen_jax.checkpoints.run_folder import write_run_files
from qwen_jax.models.build import parameter_count
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from qwen_jax.training.parameter_groups import (
    ParameterGroup,
    ScheduleConfig,
    assign_groups,
    merge_params,
    overlay_params,
    path_name,
    split_params,
)
from qwen_jax.training.program import check_run
from qwen_jax.training.state import initial_state
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, prepared_trainer, small_model

STEPS = 10
REST = ParameterGroup("rest", ".*", ScheduleConfig(1e-2))
FROZEN_LAYERS = ParameterGroup("layers", "layers/.*", None, dtype="bfloat16")


def followed(config, params, gradients):
    """Parameters after each of the gradients."""
    transform = make_optimizer(config, len(gradients))
    state, update = transform.init(params), jax.jit(transform.update)
    history = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def random_trees(shapes, count, scale=1.0):
    random = np.random.default_rng(0)
    return [
        jax.tree.map(
            lambda shape: scale * random.standard_normal(shape).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(count)
    ]


def test_groups_equal_torch_s_over_ten_steps():
    """Own rate, schedule, decay and start step; the clipping counts only what has started."""
    torch = pytest.importorskip("torch", reason="compares with torch's AdamW")
    shapes = {"encoder": {"kernel": (4, 3)}, "adapter": {"kernel": (3, 5)}, "decoder": {"kernel": (6, 2)}}
    params, *gradients = random_trees(shapes, STEPS + 1)
    groups = (
        ParameterGroup("encoder", "encoder/.*", ScheduleConfig(2e-2, "constant"), weight_decay=0.0, start_step=4),
        ParameterGroup("adapter", "adapter/.*", ScheduleConfig(1e-2, "cosine", 3, 0.2), weight_decay=0.05),
        ParameterGroup("rest", ".*", ScheduleConfig(5e-3, "cosine", 0, 0.0)),
    )
    ours = followed(OptimizerConfig(1.0, weight_decay=0.1, clip_norm=1.0, groups=groups), params, gradients)

    theirs = {name: torch.nn.Parameter(torch.tensor(leaf["kernel"])) for name, leaf in params.items()}
    settings = dict(betas=(0.9, 0.95), eps=1e-8)
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["encoder"]], "weight_decay": 0.0, "lr": 2e-2},
            {"params": [theirs["adapter"]], "weight_decay": 0.05, "lr": 1e-2},
            {"params": [theirs["decoder"]], "weight_decay": 0.1, "lr": 5e-3},
        ],
        **settings,
    )

    def cosine(step, steps, warmup, final):
        if step < warmup:
            return (step + 1) / warmup
        return final + (1 - final) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, [lambda step: 1.0, lambda step: cosine(step, 10, 3, 0.2), lambda step: cosine(step, 10, 0, 0.0)]
    )
    for step, gradient in enumerate(gradients):
        for name, parameter in theirs.items():
            started = step >= 4 or name != "encoder"
            parameter.grad = torch.tensor(gradient[name]["kernel"]) if started else None
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        adamw.step()
        schedule.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[step][name]["kernel"], parameter.detach().numpy(), atol=2e-6)
    np.testing.assert_array_equal(ours[3]["encoder"]["kernel"], params["encoder"]["kernel"])


def test_layer_wise_decay_equals_a_torch_group_per_layer():
    torch = pytest.importorskip("torch", reason="compares with torch's AdamW")
    depth, decay = 3, 0.5
    shapes = {"patch_embedding": (4, 2), "layers": {"up": {"kernel": (depth, 2, 5)}}, "head": {"kernel": (5, 3)}}
    params, *gradients = random_trees(shapes, STEPS + 1)
    group = ParameterGroup("all", ".*", ScheduleConfig(1e-2, "constant"), layer_decay=decay)
    config = OptimizerConfig(1.0, weight_decay=0.1, clip_norm=None, groups=(group,))
    ours = followed(config, params, gradients)[-1]

    def parts(tree):
        return [tree["patch_embedding"], *tree["layers"]["up"]["kernel"], tree["head"]["kernel"]]

    theirs = [torch.nn.Parameter(torch.tensor(part)) for part in parts(params)]
    rates = [1e-2 * decay**power for power in (4, 3, 2, 1, 0)]
    adamw = torch.optim.AdamW(
        [{"params": [part], "lr": rate} for part, rate in zip(theirs, rates, strict=True)],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    for gradient in gradients:
        for part, one in zip(theirs, parts(gradient), strict=True):
            part.grad = torch.tensor(one)
        adamw.step()
    for part, one in zip(theirs, parts(ours), strict=True):
        np.testing.assert_allclose(one, part.detach().numpy(), atol=2e-6)


def test_one_group_for_everything_is_the_optimizer_without_groups():
    params, *gradients = random_trees({"layers": {"kernel": (2, 4)}, "norm": {"scale": (4,)}}, STEPS + 1, 0.3)
    plain = OptimizerConfig(1e-2, warmup_steps=2)
    grouped = dataclasses.replace(
        plain, peak_learning_rate=1.0, groups=(ParameterGroup("all", ".*", ScheduleConfig(1e-2, warmup_steps=2)),)
    )
    for one, other in zip(followed(plain, params, gradients), followed(grouped, params, gradients), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_rates_of_groups_are_reported_as_they_are_used():
    groups = (
        ParameterGroup("late", "a", ScheduleConfig(4e-3, "constant"), start_step=3),
        ParameterGroup("rest", ".*", ScheduleConfig(1e-2, "constant", warmup_steps=2)),
    )
    rates = learning_rates(OptimizerConfig(1.0, groups=groups), STEPS)
    found = [{name: float(value) for name, value in rates(jnp.int32(made)).items()} for made in (0, 2, 3)]
    assert [row["learning_rate/late"] for row in found] == pytest.approx([0, 0, 4e-3])
    assert [row["learning_rate/rest"] for row in found] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert [row["learning_rate"] for row in found] == [row["learning_rate/late"] for row in found]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((FROZEN_LAYERS,), "parameter final_norm/scale is in no group: none of the patterns 'layers/.*'"),
        ((REST, FROZEN_LAYERS), "group 'layers' .* is idle: all 12 parameters .* belong to earlier groups.* 'rest'"),
        ((ParameterGroup("lora", ".*/lora_a", None), REST), "group 'lora' .* is idle: no parameter matches"),
        ((FROZEN_LAYERS, dataclasses.replace(REST, name="layers")), "two groups named 'layers'"),
        ((dataclasses.replace(REST, schedule=None),), "every group .* is frozen"),
        ((FROZEN_LAYERS, dataclasses.replace(REST, layer_decay=0.9)), "group 'rest' .* has a layer_decay, and none"),
    ],
)
def test_groups_that_do_not_fit_the_parameters_are_refused_by_name(groups, message):
    model, mesh = Qwen(small_model()), make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match=message):
        check_run(model, OptimizerConfig(1e-3, groups=groups), STEPS, mesh, batch_size=8, columns=token_columns(16))


def test_settings_of_groups_that_make_no_sense_are_refused():
    schedule = ScheduleConfig(1e-3)
    for settings, message in (
        ({"pattern": "layers/("}, "pattern of group 'g' must be a regular expression"),
        ({"name": "two words"}, "name must be a word"),
        ({"schedule": 3e-4}, "schedule of group 'g' must be a ScheduleConfig, or None"),
        ({"layer_decay": 1.5}, r"layer_decay of group 'g' must be in \(0, 1\]"),
        ({"start_step": -1}, "start_step of group 'g'"),
        ({"weight_decay": "0.1"}, "ParameterGroup.weight_decay must be a number"),
        ({"dtype": "float16"}, "dtype of group 'g' must be float32 or bfloat16"),
        ({"dtype": "bfloat16"}, "must be float32, since the group is trained"),
    ):
        with pytest.raises(ValueError, match=message):
            ParameterGroup(**{"name": "g", "pattern": ".*", "schedule": schedule, **settings})
    with pytest.raises(ValueError, match="ScheduleConfig.peak_learning_rate must be a number and positive"):
        ScheduleConfig(0)
    late = dataclasses.replace(REST, start_step=10)
    with pytest.raises(ValueError, match="group 'rest' starts at step 10, after the last of 10 steps"):
        make_optimizer(OptimizerConfig(1.0, groups=(late,)), 10)
    with pytest.raises(ValueError, match="OptimizerConfig.groups must hold ParameterGroups, found 'rest'"):
        OptimizerConfig(1.0, groups=["rest"])
    for wrong in (None, REST):
        with pytest.raises(ValueError, match="OptimizerConfig.groups must be a list of ParameterGroups, found"):
            OptimizerConfig(1.0, groups=wrong)


def test_a_split_tree_merges_to_what_it_was():
    params = {"layers": {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, "output": np.ones(1, np.float32)}
    trained, frozen = split_params(params, (ParameterGroup("a", "layers/a", None), REST))
    assert list(trained["layers"]) == ["b"] and list(frozen["layers"]) == ["a"]
    assert jax.tree.structure(merge_params(trained, frozen)) == jax.tree.structure(params)
    assert split_params(params, ()) == (params, {})
    assert overlay_params(params, {"layers": {"a": 7}}) == {**params, "layers": {**params["layers"], "a": 7}}
    with pytest.raises(ValueError, match="the model has no parameter layers/c; it has layers/a, layers/b, output"):
        overlay_params(params, {"layers": {"c": 7}})
    assert assign_groups(["layers/a"], (REST,))["layers/a"] is REST


def test_the_memory_check_counts_gradients_and_moments_of_what_is_trained_alone():
    model, mesh = Qwen(small_model()), make_mesh(MeshConfig(), jax.devices()[:1])
    shape = {"batch_size": 8, "columns": token_columns(16)}
    needed = check_run(model, OptimizerConfig(1e-3, groups=(FROZEN_LAYERS, REST)), STEPS, mesh, **shape)
    state = initial_state(model, optax.identity(), mesh, 0)
    trained = sum(leaf.size for name, leaf in named(state.params).items() if not name.startswith("layers/"))
    total = parameter_count(model.config)
    assert needed["parameters"] == 4 * trained and needed["gradients"] == 2 * trained
    assert needed["frozen parameters"] == 2 * (total - trained)
    assert 8 * trained <= needed["optimizer"] <= 8 * trained + 1024


def named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


CONFIG = TrainerConfig(
    train_steps=4, batch_size=8, sequence_length=16, log_every=1, checkpoint_every=2, keep_checkpoints=9
)


def trained(folder, groups, layout=(1, 1, 1), clip_norm=1e-3):
    write_run_files(folder, small_model(), None)
    made = prepared_trainer(
        Qwen(small_model()),
        next_token_prediction(),
        OptimizerConfig(1e-2, clip_norm=clip_norm, groups=groups),
        CONFIG,
        make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))]),
        FakeExamples(),
        None,
        folder,
    )
    return made


@pytest.fixture(scope="module")
def frozen_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "run"
    made = trained(folder, (FROZEN_LAYERS, REST))
    before = jax.tree.map(np.asarray, made.state)
    made.run()
    return folder, before, made


def test_frozen_parameters_stay_bit_for_bit_and_have_no_moments(frozen_layers):
    folder, before, made = frozen_layers
    after = jax.tree.map(np.asarray, made.state)
    for name, leaf in named(after.frozen).items():
        assert leaf.dtype == jnp.bfloat16 and leaf.tobytes() == named(before.frozen)[name].tobytes(), name
    assert all((leaf != named(before.params)[name]).any() for name, leaf in named(after.params).items())
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.size > 128]
    assert sum(leaf.size for leaf in moments) == 2 * sum(
        leaf.size for leaf in jax.tree.leaves(after.params) if leaf.size > 128
    )
    # For everything that reads weights, the run is one of a whole model.
    _, params = load_params(folder)
    stored = StoredParams(folder)
    assert named(params).keys() == named(after.all_params).keys() == stored.shapes.keys()
    for name, leaf in named(after.all_params).items():
        np.testing.assert_array_equal(named(params)[name], leaf.astype(np.float32))
        np.testing.assert_array_equal(np.asarray(stored.read(name, slice(0, 1)), np.float32), named(params)[name][:1])


def test_frozen_parameters_add_nothing_to_the_gradient_norm(frozen_layers):
    """The norm of the first step, in a model that computes the same, is that of the trained leaves."""
    _, before, made = frozen_layers
    batch = FakeExamples().read(0, 8)

    def loss(params):
        total, sums = next_token_prediction().loss(made.model, params, batch, None)
        return total / sums["weight"]

    params = merge_params(before.params, jax.tree.map(lambda leaf: leaf.astype(np.float32), before.frozen))
    gradient = named(jax.jit(jax.grad(loss))(params))
    of_trained = np.sqrt(sum(float((gradient[name] ** 2).sum()) for name in named(before.params)))
    rows = [row for row in read_metrics(made.run_folder.folder) if "loss" in row]
    np.testing.assert_allclose(rows[0]["gradient_norm"], of_trained, rtol=1e-5)


def test_a_run_with_frozen_parameters_resumes_bit_for_bit_and_moves_to_another_mesh(frozen_layers, tmp_path):
    folder, _, made = frozen_layers
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    resumed = trained(copy, (FROZEN_LAYERS, REST))
    assert resumed.start_step == 2
    resumed.run()
    for one, other in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(made.state), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    moved = trained(copy, (FROZEN_LAYERS, REST), layout=(2, 2, 2))
    for one, other in zip(jax.tree.leaves(moved.state), jax.tree.leaves(made.state), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
