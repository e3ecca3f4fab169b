"""AdamW with warm-up, a schedule, clipping, and weight decay on matrices only (report 2.4 and 3.1)."""

import dataclasses

import jax
import optax

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
        update itself is float32, and so is the second moment: what a step adds to it is near bfloat16's rounding.
      skip: which updates are left out; by default none.
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

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"OptimizerConfig.schedule must be cosine or constant, found {self.schedule!r}")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"OptimizerConfig.first_moment_dtype must be float32 or bfloat16, found {self.first_moment_dtype!r}"
            )
        for field in ("peak_learning_rate", "final_fraction", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm"):
            value = getattr(self, field)
            positive = field in ("peak_learning_rate", "clip_norm")
            if value is None and field == "clip_norm":
                continue
            if not isinstance(value, (int, float)) or not value >= 0 or (positive and value == 0):
                least = "positive" if positive else "at least 0"
                raise ValueError(f"OptimizerConfig.{field} must be a number and {least}, found {value!r}")
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(
                f"OptimizerConfig.warmup_steps must be an integer of at least 0, found {self.warmup_steps!r}"
            )


def learning_rate_schedule(config: OptimizerConfig, train_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already made.

    Raises:
      ValueError: warm-up does not end before the last step.
    """
    if config.warmup_steps >= train_steps:
        raise ValueError(
            f"OptimizerConfig.warmup_steps ({config.warmup_steps}) must be less than the number of steps "
            f"({train_steps}): lower WARMUP_STEPS or raise TRAIN_STEPS"
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


def path_name(path) -> str:
    """`layers/mlp/up/kernel` for a pytree path; boxes of logical names are left out."""
    return "/".join(str(key.key) for key in path if hasattr(key, "key"))


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `train_steps` updates."""
    # Both have a state of the same structure: clipping may be turned on and off between two starts of a run.
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        learning_rate_schedule(config, train_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.first_moment_dtype,
    )
    return skip_updates(optax.chain(clip, adamw), config.skip)
