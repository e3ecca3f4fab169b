"""AdamW against torch's, the schedule at its corners, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.models.transformer import Qwen
from qwen_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
from qwen_jax.training.parameter_groups import path_name
from tests.fakes import small_model


def test_updates_equal_torch():
    torch = pytest.importorskip("torch", reason="compares with torch's AdamW")
    random = np.random.default_rng(0)
    params = {"kernel": random.standard_normal((5, 7), np.float32), "bias": random.standard_normal(7, np.float32)}
    config = OptimizerConfig(1e-2, schedule="constant", weight_decay=0.1, clip_norm=1.0)
    transform = make_optimizer(config, 100)
    (ours, state), update = (params, transform.init(params)), jax.jit(transform.update)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    adamw = torch.optim.AdamW(
        [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for scale in (0.01, 3.0, 1.0, 0.1, 10.0):  # clipped and not
        gradient = {n: scale * random.standard_normal(v.shape).astype(np.float32) for n, v in params.items()}
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        adamw.step()
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), atol=2e-6)


def test_a_first_moment_in_bfloat16_takes_half_the_memory_and_moves_parameters_alike():
    random = np.random.default_rng(0)
    params = {"kernel": random.standard_normal((50, 70), np.float32)}
    gradients = [{"kernel": random.standard_normal((50, 70), np.float32)} for _ in range(20)]

    def moved(dtype):
        transform = make_optimizer(OptimizerConfig(1e-2, schedule="constant", first_moment_dtype=dtype), 100)
        (ours, state), update = (params, transform.init(params)), jax.jit(transform.update)
        for gradient in gradients:
            updates, state = update(gradient, state, ours)
            ours = optax.apply_updates(ours, updates)
        return ours["kernel"] - params["kernel"], state

    (exact, wide), (close, narrow) = moved("float32"), moved("bfloat16")
    wide_bytes, narrow_bytes = (sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for state in (wide, narrow))
    assert wide_bytes - narrow_bytes == 50 * 70 * 2
    assert close.dtype == jnp.float32 and 1e-6 < np.abs(close - exact).max() < 0.01 * np.abs(exact).max()
    with pytest.raises(ValueError, match="first_moment_dtype must be float32 or bfloat16, found 'float16'"):
        OptimizerConfig(1e-2, first_moment_dtype="float16")


def test_weight_decay_touches_matrices_only():
    shapes = jax.eval_shape(lambda: Qwen(small_model()).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    mask = decay_mask(shapes)
    decayed = {path_name(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on}
    spared = {path_name(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if not on}
    assert spared == {
        "final_norm/scale",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
        "layers/attention/query/bias",
        "layers/attention/key/bias",
        "layers/attention/value/bias",
    }
    assert {"token_embedding", "output", "layers/mlp/down/kernel", "layers/attention/query/kernel"} <= decayed


def test_the_schedule_warms_up_peaks_and_ends_at_a_tenth():
    schedule = learning_rate_schedule(OptimizerConfig(3e-4, warmup_steps=10), 110)
    rates = np.asarray([float(schedule(step)) for step in range(111)])
    np.testing.assert_allclose(rates[:10], 3e-4 * np.arange(1, 11) / 10, rtol=1e-5)
    assert rates.argmax() in (9, 10) and np.all(np.diff(rates[10:]) < 0)
    np.testing.assert_allclose(rates[60], 3e-4 * (0.1 + 0.9 * 0.5), rtol=1e-3)
    np.testing.assert_allclose(rates[110], 3e-5, rtol=1e-5)
    constant = learning_rate_schedule(OptimizerConfig(3e-6, schedule="constant"), 10)
    assert float(constant(0)) == float(constant(9)) == pytest.approx(3e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="warmup_steps"):
        learning_rate_schedule(OptimizerConfig(1e-3, warmup_steps=10), 10)
    with pytest.raises(ValueError, match="schedule"):
        OptimizerConfig(1e-3, schedule="linear")
    with pytest.raises(ValueError, match="peak_learning_rate"):
        OptimizerConfig(0.0)
    for field, value in (
        ("peak_learning_rate", "3e-4x"),
        ("clip_norm", 0),
        ("weight_decay", -0.1),
        ("beta2", float("nan")),
        ("beta1", 1.0),
        ("beta2", 1.5),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
    ):
        with pytest.raises(ValueError, match=f"OptimizerConfig.{field} must be .* found {value!r}"):
            OptimizerConfig(**{"peak_learning_rate": 1e-3, field: value})


def test_clipping_may_be_turned_off_in_the_middle_of_a_run():
    states = [
        jax.eval_shape(make_optimizer(OptimizerConfig(1e-3, clip_norm=norm), 10).init, {"kernel": jnp.zeros(3)})
        for norm in (1.0, None)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
