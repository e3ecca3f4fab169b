"""Skips updates that would harm a run: gradients that are not finite, and spikes of their norm.

The report mentions neither, so both are off by default. The optimizer's state always holds the statistics for spikes:
every checkpoint has them, a resumed run decides as an uninterrupted one, and skipping can be turned on in the middle of
a run that begins to spike.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Number of norms in the median. A constant, so that a checkpoint fits any SkipConfig.
WINDOW = 128


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Conditions for skipping an update. Metrics count every skipped update; its examples are not read again.

    Attributes:
      nonfinite: skip where the norm of the gradient is infinite or NaN.
      spike_factor: skip where the norm is more than this many times the median norm of the last 128 updates that were
        made; None skips no spike. The median and not the mean, because one spike that passes moves it by one rank.
      least_history: number of updates that must precede the first spike.
      most_in_a_row: number of consecutive skipped updates that ends the run: the fault is then in the weights.
    """

    nonfinite: bool = False
    spike_factor: float | None = None
    least_history: int = 32
    most_in_a_row: int = 10

    def __post_init__(self):
        if not isinstance(self.nonfinite, bool):  # "false" would be true
            raise ValueError(f"SkipConfig.nonfinite must be True or False, found {self.nonfinite!r}")
        factor = self.spike_factor
        if factor is not None and not (isinstance(factor, (int, float)) and factor > 1):
            raise ValueError(f"SkipConfig.spike_factor must be a number of more than 1, or None; found {factor!r}")
        for field in ("least_history", "most_in_a_row"):
            if not isinstance(getattr(self, field), int):
                raise ValueError(f"SkipConfig.{field} must be an integer, found {getattr(self, field)!r}")
        if not 1 <= self.least_history <= WINDOW:
            raise ValueError(f"SkipConfig.least_history must be in [1, {WINDOW}], found {self.least_history!r}")
        if self.most_in_a_row < 1:
            raise ValueError(f"SkipConfig.most_in_a_row must be at least 1, found {self.most_in_a_row!r}")


class HealthState(NamedTuple):
    """Around the state of the wrapped optimizer.

    norms: float32 [128], gradient norms of the last updates that were made, oldest overwritten first; made: int32,
    updates made; skipped: int32, left out; in_a_row: int32, left out since the last one that was made.
    """

    inner: optax.OptState
    norms: jax.Array
    made: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def skip_updates(inner: optax.GradientTransformation, config: SkipConfig) -> optax.GradientTransformation:
    """`inner`, whose update and state are left out where `config` says so.

    After a skipped update parameters and the state of `inner` are bit for bit what they were; a learning-rate schedule
    inside `inner` counts the updates made, so it lags behind the steps by those skipped.
    """

    def init(params) -> HealthState:
        zero = jnp.zeros((), jnp.int32)
        return HealthState(inner.init(params), jnp.zeros(WINDOW, jnp.float32), zero, zero, zero)

    def update(updates, state, params=None):
        norm = optax.global_norm(updates).astype(jnp.float32)
        skip = jnp.zeros((), bool)
        if config.nonfinite:
            skip |= ~jnp.isfinite(norm)
        if config.spike_factor is not None:
            known = jnp.where(jnp.arange(WINDOW) < state.made, state.norms, jnp.nan)
            skip |= (state.made >= config.least_history) & (norm > config.spike_factor * jnp.nanmedian(known))
        updates, inner_state = inner.update(updates, state.inner, params)
        if config.nonfinite or config.spike_factor is not None:
            # Adding -0.0 changes no bit of any number; adding 0.0 would turn -0.0 into 0.0.
            updates = jax.tree.map(lambda u: jnp.where(skip, jnp.full_like(u, -0.0), u), updates)
            inner_state = jax.tree.map(lambda new, old: jnp.where(skip, old, new), inner_state, state.inner)
        one = skip.astype(jnp.int32)
        return updates, HealthState(
            inner_state,
            jnp.where(skip, state.norms, state.norms.at[state.made % WINDOW].set(norm)),
            state.made + 1 - one,
            state.skipped + one,
            jnp.where(skip, state.in_a_row + 1, 0),
        )

    return optax.GradientTransformation(init, update)


def updates_made(state: optax.OptState, step: jax.Array) -> jax.Array:
    """Number of the `step` updates that were not skipped, which a learning-rate schedule counts."""
    return state.made if isinstance(state, HealthState) else step


def skip_metrics(state: optax.OptState) -> dict[str, jax.Array]:
    """Scalars for the metrics of a step: skipped updates so far, and consecutive ones."""
    if not isinstance(state, HealthState):
        return {}
    return {"skipped_updates": state.skipped, "skipped_in_a_row": state.in_a_row}
