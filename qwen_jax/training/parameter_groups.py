"""Parameter groups: each has its own learning rate and start step, or is frozen (arXiv 2308.12966, table 8).

Groups are matched by the path of a parameter, such as `layers/mlp/up/kernel`; the first group that matches takes it. A
frozen group is split off before gradients are computed, so it costs no gradient, no moments and no clipping.
"""

import dataclasses
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

SCHEDULES = ("cosine", "constant")
# Components that lie before the first layer of an encoder, besides embeddings.
_BEFORE_LAYERS = ("positions", "input_norm")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate of a group over its updates, counted from the start step of the group.

    Attributes:
      peak_learning_rate: reached at the end of warm-up.
      schedule: "cosine" falls to `final_fraction` of the peak at the last step; "constant" stays at the peak.
      warmup_steps: linear from 0. Must be less than the number of steps.
      final_fraction: of the peak, at the last step of "cosine".
    """

    peak_learning_rate: float
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self):
        check_schedule(self)


def check_schedule(config) -> None:
    """Checks the four fields of a schedule, which `OptimizerConfig` has as well.

    Raises:
      ValueError: naming the class and the field.
    """
    name = type(config).__name__
    if config.schedule not in SCHEDULES:
        raise ValueError(f"{name}.schedule must be cosine or constant, found {config.schedule!r}")
    check_numbers(config, positive=("peak_learning_rate",), not_negative=("final_fraction",))
    if not isinstance(config.warmup_steps, int) or config.warmup_steps < 0:
        raise ValueError(f"{name}.warmup_steps must be an integer of at least 0, found {config.warmup_steps!r}")


def check_numbers(config, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Checks fields of a dataclass.

    Raises:
      ValueError: a field is not a number, or too small.
    """
    for field in (*positive, *not_negative):
        value = getattr(config, field)
        if not isinstance(value, (int, float)) or not value >= 0 or (field in positive and value == 0):
            least = "positive" if field in positive else "at least 0"
            raise ValueError(f"{type(config).__name__}.{field} must be a number and {least}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a schedule, or are frozen together.

    Attributes:
      name: in errors and metrics (`learning_rate/NAME`).
      pattern: regular expression that matches the whole path of a parameter, such as `layers/.*` or `.*/lora_[ab]`.
      schedule: learning rate; None freezes the group.
      weight_decay: decoupled, times the learning rate; None takes `OptimizerConfig.weight_decay`. Norms and biases have
        none in any case.
      start_step: updates of the run before the first update of this group. Until then its parameters and moments do not
        change, and its gradient does not count for clipping.
      layer_decay: factor on the update per layer below the top (BEiT, arXiv 2106.08254): layer i of n is multiplied by
        layer_decay^(n - i), what lies before the first layer by layer_decay^(n + 1), everything else by 1. Layers are
        the first axis of the parameters below a `layers` component. Before them lie, of the components beside it,
        those with `embedding` in their name, `positions` and `input_norm`.
      dtype: of a frozen group: "float32", or "bfloat16", which halves its memory.
    """

    name: str
    pattern: str
    schedule: ScheduleConfig | None
    weight_decay: float | None = None
    start_step: int = 0
    layer_decay: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"ParameterGroup.name must be a word, found {self.name!r}")
        where = f"of group {self.name!r}"
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"ParameterGroup.pattern {where} must be a regular expression, found {self.pattern!r}: {error}"
            ) from error
        if self.schedule is not None and not isinstance(self.schedule, ScheduleConfig):
            raise ValueError(
                f"ParameterGroup.schedule {where} must be a ScheduleConfig, or None to freeze it; "
                f"found {self.schedule!r}"
            )
        if self.weight_decay is not None:
            check_numbers(self, not_negative=("weight_decay",))
        if not isinstance(self.start_step, int) or self.start_step < 0:
            raise ValueError(
                f"ParameterGroup.start_step {where} must be an integer of at least 0, found {self.start_step!r}"
            )
        if not isinstance(self.layer_decay, (int, float)) or not 0 < self.layer_decay <= 1:
            raise ValueError(f"ParameterGroup.layer_decay {where} must be in (0, 1], found {self.layer_decay!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"ParameterGroup.dtype {where} must be float32 or bfloat16, found {self.dtype!r}")
        if self.schedule is not None and self.dtype != "float32":
            raise ValueError(f"ParameterGroup.dtype {where} must be float32, since the group is trained")

    @property
    def frozen(self) -> bool:
        """Whether the group is not trained."""
        return self.schedule is None


def path_name(path) -> str:
    """`layers/mlp/up/kernel` for a pytree path; boxes of logical names are left out."""
    return "/".join(str(key.key) for key in path if hasattr(key, "key"))


def assign_groups(paths: Sequence[str], groups: Sequence[ParameterGroup]) -> dict[str, ParameterGroup]:
    """The group of every parameter: the first one whose pattern matches the whole path.

    Args:
      paths: of all parameters of the model.

    Raises:
      ValueError: two groups have one name, a parameter is in no group, a group is idle because no parameter matches or
        earlier groups take all that do, or a group with layer-wise decay has no layers.
    """
    names = [group.name for group in groups]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"OptimizerConfig.groups has two groups named {twice!r}: name them differently")
    found: dict[str, ParameterGroup] = {}
    for path in paths:
        group = next((group for group in groups if re.fullmatch(group.pattern, path)), None)
        if group is None:
            patterns = ", ".join(repr(group.pattern) for group in groups)
            raise ValueError(
                f"parameter {path} is in no group: none of the patterns {patterns} matches it. Add a group to "
                f"OptimizerConfig.groups (a last group '.*' takes the rest)"
            )
        found[path] = group
    for group in groups:
        if group in found.values():
            continue
        matching = [path for path in paths if re.fullmatch(group.pattern, path)]
        why = (
            f"all {len(matching)} parameters that its pattern {group.pattern!r} matches belong to earlier groups, such "
            f"as {matching[0]} to {found[matching[0]].name!r}: put it before them"
            if matching
            else f"no parameter matches its pattern {group.pattern!r}: correct it, or remove the group"
        )
        raise ValueError(f"group {group.name!r} of OptimizerConfig.groups is idle: {why}")
    for group in groups:
        if group.layer_decay != 1 and not any(has_layers(path) for path in paths if found[path] == group):
            raise ValueError(
                f"group {group.name!r} of OptimizerConfig.groups has a layer_decay, and none of its parameters lies "
                f"below a component `layers`: leave layer_decay out"
            )
    if groups and all(group.frozen for group in groups):
        raise ValueError("every group of OptimizerConfig.groups is frozen: give one of them a schedule")
    return found


def split_params(params: dict, groups: Sequence[ParameterGroup]) -> tuple[dict, dict]:
    """Splits a parameter tree into (trained, frozen); frozen leaves are cast to the dtype of their group.

    Args:
      params: nested dict of arrays, of ShapeDtypeStructs, or of either in boxes with logical names.
      groups: as in `OptimizerConfig.groups`; without any, everything is trained.

    Raises:
      ValueError: as `assign_groups`.
    """
    if not groups:
        return params, {}
    flat = flatten_dict(params, sep="/")
    group_of = assign_groups(list(flat), groups)
    trained = {path: leaf for path, leaf in flat.items() if not group_of[path].frozen}
    frozen = {path: _cast(leaf, group_of[path].dtype) for path, leaf in flat.items() if group_of[path].frozen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def _cast(leaf, dtype: str):
    if isinstance(leaf, nn.meta.AxisMetadata):
        return leaf.replace_boxed(_cast(leaf.unbox(), dtype))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
    return leaf.astype(dtype)


def merge_params(params: dict, frozen: dict) -> dict:
    """One tree of the trained and the frozen parameters: the inverse of `split_params`."""
    if not frozen:
        return params
    return unflatten_dict({**flatten_dict(params), **flatten_dict(frozen)})


def overlay_params(params: dict, replacement: dict) -> dict:
    """`params` with the leaves that `replacement`, which may be a sub-tree, has.

    Raises:
      ValueError: `replacement` has a leaf that `params` lacks.
    """
    whole, part = flatten_dict(params, sep="/"), flatten_dict(replacement, sep="/")
    if unknown := sorted(part.keys() - whole.keys()):
        raise ValueError(f"the model has no parameter {unknown[0]}; it has {', '.join(sorted(whole)[:5])}, …")
    return unflatten_dict(whole | part, sep="/")


def has_layers(path: str) -> bool:
    """Whether the first axis of a parameter with this path is the axis of stacked layers."""
    return "layers" in path.split("/")


def layer_multipliers(params, decay: float):
    """Pytree of factors of the layer-wise decay: float32 [layers, 1, …] or a number."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stacked = [(path_name(path), leaf) for path, leaf in leaves if has_layers(path_name(path))]
    depth = max(leaf.shape[0] for _, leaf in stacked)
    beside = {tuple(name.split("/")[: name.split("/").index("layers")]) for name, _ in stacked}

    def one(path, leaf):
        name = path_name(path)
        if has_layers(name):
            above = jnp.arange(leaf.shape[0], 0, -1, dtype=jnp.float32)
            return jnp.power(jnp.float32(decay), above).reshape(-1, *[1] * (leaf.ndim - 1))
        parts = name.split("/")
        first = any(
            "embedding" in part or part in _BEFORE_LAYERS for n, part in enumerate(parts) if tuple(parts[:n]) in beside
        )
        return decay ** (depth + 1) if first else 1.0

    return jax.tree_util.tree_map_with_path(one, params)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by `layer_multipliers`."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.multiply, updates, layer_multipliers(updates, decay)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def start_late(inner: optax.GradientTransformation, start_step: int) -> optax.GradientTransformation:
    """`inner` from step `start_step` (counted from 0) on; until then neither its state nor the parameters change."""

    def init(params):
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates, state, params=None):
        made, inner_state = state
        started = made >= start_step
        updates, new_state = inner.update(updates, inner_state, params)
        # Adding -0.0 changes no bit of any number.
        updates = jax.tree.map(lambda u: jnp.where(started, u, jnp.full_like(u, -0.0)), updates)
        new_state = jax.tree.map(lambda new, old: jnp.where(started, new, old), new_state, inner_state)
        return updates, (made + 1, new_state)

    return optax.GradientTransformation(init, update) if start_step else inner


def drop_gradients_before_start(groups: Sequence[ParameterGroup]) -> optax.GradientTransformation:
    """Sets the gradients of groups that have not started to 0, so that clipping does not count them."""

    def update(updates, state, params=None):
        made, leaves = state, jax.tree_util.tree_leaves_with_path(updates)
        group_of = {name: first_match(name, groups) for name in (path_name(path) for path, _ in leaves)}

        def one(path, leaf):
            start = group_of[path_name(path)].start_step
            return jnp.where(made >= start, leaf, jnp.zeros_like(leaf)) if start else leaf

        return jax.tree_util.tree_map_with_path(one, updates), made + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def first_match(path: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    """The first group whose pattern matches a parameter; `assign_groups` has checked that there is one."""
    return next(group for group in groups if re.fullmatch(group.pattern, path))
