"""AdamW with warm-up, a schedule, clipping, and weight decay on matrices only (report 2.4 and 3.1)."""

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import optax

from qwen_jax.training.parameter_groups import (
    ParameterGroup,
    ScheduleConfig,
    check_numbers,
    check_schedule,
    drop_gradients_before_start,
    first_match,
    path_name,
    scale_by_layer,
    start_late,
)
from qwen_jax.training.resilience import SkipConfig, skip_updates


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyperparameters of the optimizer.

    Attributes:
      peak_learning_rate: reached at the end of warm-up.
      schedule: "cosine" falls to `final_fraction` of the peak at the last step; "constant" stays at the peak.
      warmup_steps: linear from 0. Must be less than the number of steps.
      final_fraction: of the peak, at the last step of "cosine".
      beta1, beta2, epsilon: of Adam.
      weight_decay: decoupled, times the learning rate, on projections, embedding and output; not on norms and biases.
      clip_norm: largest global norm of the gradient; None does not clip.
      first_moment_dtype: "float32", or "bfloat16", which saves 2 of the 12 bytes of a parameter and its moments. The
        update itself is float32, and so is the second moment, which one step changes by about the rounding of bfloat16.
      skip: conditions under which an update is skipped; by default none.
      groups: parameters that are trained differently, or frozen. Without groups, the schedule and the weight decay
        above apply to all parameters; with them, each group has its own schedule, and a parameter in no group is an
        error.
    """

    peak_learning_rate: float
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    first_moment_dtype: str = "float32"
    skip: SkipConfig = SkipConfig()
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self):
        check_schedule(self)
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"OptimizerConfig.first_moment_dtype must be float32 or bfloat16, found {self.first_moment_dtype!r}"
            )
        check_numbers(self, not_negative=("beta1", "beta2", "epsilon", "weight_decay"))
        for field in ("beta1", "beta2"):
            if not getattr(self, field) < 1:
                raise ValueError(f"OptimizerConfig.{field} must be below 1, found {getattr(self, field)!r}")
        if self.clip_norm is not None:
            check_numbers(self, positive=("clip_norm",))
        if not isinstance(self.groups, list | tuple):
            raise ValueError(f"OptimizerConfig.groups must be a list of ParameterGroups, found {self.groups!r}")
        object.__setattr__(self, "groups", tuple(self.groups))  # gin gives a list
        if wrong := next((group for group in self.groups if not isinstance(group, ParameterGroup)), None):
            raise ValueError(f"OptimizerConfig.groups must hold ParameterGroups, found {wrong!r}")


def learning_rate_schedule(config: OptimizerConfig | ScheduleConfig, train_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already made.

    Raises:
      ValueError: warm-up does not end before the last step.
    """
    if config.warmup_steps >= train_steps:
        raise ValueError(
            f"{type(config).__name__}.warmup_steps ({config.warmup_steps}) must be less than the number of steps "
            f"({train_steps}): lower WARMUP_STEPS, or raise TRAIN_STEPS or EPOCHS"
        )
    peak = config.peak_learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, train_steps - config.warmup_steps, alpha=config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    # The first update already learns something: step 0 of the ramp is 1/warmup of the peak.
    ramp = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([ramp, after], [config.warmup_steps])


def decay_mask(params):
    """Pytree of bools: True for the leaves that weight decay applies to.

    By name, not by rank: a norm's scale is a matrix once the layers are stacked.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).split("/")[-1] not in ("scale", "bias"), params
    )


def learning_rates(config: OptimizerConfig, train_steps: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The metrics of learning rates as a function of the number of updates made.

    Returns:
      "learning_rate"; with groups, that of the first one that is trained, and `learning_rate/NAME` of each.

    Raises:
      ValueError: a group starts or its warm-up ends after the last step.
    """
    if not config.groups:
        schedule = learning_rate_schedule(config, train_steps)
        return lambda made: {"learning_rate": jnp.asarray(schedule(made), jnp.float32)}
    trained = {group.name: group for group in config.groups if not group.frozen}
    schedules = {name: _group_schedule(group, train_steps) for name, group in trained.items()}

    def rates(made):
        found = {}
        for name, schedule in schedules.items():
            start = trained[name].start_step
            rate = jnp.asarray(schedule(jnp.maximum(made - start, 0)), jnp.float32)
            found[f"learning_rate/{name}"] = jnp.where(made >= start, rate, 0.0)
        return {"learning_rate": next(iter(found.values())), **found}

    return rates


def _group_schedule(group: ParameterGroup, train_steps: int) -> optax.Schedule:
    if group.start_step >= train_steps:
        raise ValueError(
            f"group {group.name!r} starts at step {group.start_step}, after the last of {train_steps} steps: lower "
            f"ParameterGroup.start_step, or raise TRAIN_STEPS or EPOCHS"
        )
    assert group.schedule is not None  # callers leave frozen groups out
    return learning_rate_schedule(group.schedule, train_steps - group.start_step)


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `train_steps` updates.

    Raises:
      ValueError: warm-up or the start of a group lies after the last step.
    """
    # Both have a state of the same structure: clipping may be turned on and off between two starts of a run.
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if not config.groups:
        adamw = _adamw(config, learning_rate_schedule(config, train_steps), config.weight_decay)
        return skip_updates(optax.chain(clip, adamw), config.skip)
    transforms: dict[Hashable, optax.GradientTransformation] = {}
    for group in config.groups:
        if not group.frozen:
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            adamw = _adamw(config, _group_schedule(group, train_steps), decay)
            if group.layer_decay != 1:
                adamw = optax.chain(adamw, scale_by_layer(group.layer_decay))
            transforms[group.name] = start_late(adamw, group.start_step)
    if any(group.start_step for group in config.groups):
        clip = optax.chain(drop_gradients_before_start(config.groups), clip)

    def group_names(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: first_match(path_name(path), config.groups).name, params
        )

    return skip_updates(optax.chain(clip, optax.partition(transforms, group_names)), config.skip)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=weight_decay,
        mask=decay_mask,
        mu_dtype=config.first_moment_dtype,
    )
