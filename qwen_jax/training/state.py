"""The state of a run, created and restored sharded: no host or device ever holds the whole of it."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qwen_jax.sharding import tree_shardings, use_mesh
from qwen_jax.training.model import Model
from qwen_jax.training.parameter_groups import ParameterGroup, merge_params, split_params


@flax.struct.dataclass
class TrainState:
    """The state of a run between two updates.

    Attributes:
      step: int32, updates made.
      params: float32 pytree of the trained parameters.
      frozen: pytree of the frozen parameters, float32 or bfloat16; together with `params` the model's parameters.
      opt_state: the optimizer's pytree, of `params` alone.
      extra: pytree of running statistics that an objective keeps.
    """

    step: jax.Array
    params: dict
    frozen: dict
    opt_state: optax.OptState
    extra: dict

    @property
    def all_params(self) -> dict:
        """Trained and frozen parameters in one tree."""
        return merge_params(self.params, self.frozen)


# Names of the trees of a checkpoint, and the fields of the state that they hold.
_TREES = {"params": "params", "frozen": "frozen", "optimizer": "opt_state", "extra": "extra"}


def trees_of(state: TrainState) -> dict:
    """The named trees that a checkpoint holds; those without leaves are left out."""
    trees = {name: getattr(state, field) for name, field in _TREES.items()}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def state_from(step: jax.Array, trees: dict) -> TrainState:
    """The state after `step` updates: the inverse of `trees_of`."""
    return TrainState(step, **{field: trees.get(name, {}) for name, field in _TREES.items()})


def _state_of(params, optimizer, groups: Sequence[ParameterGroup], initial_extra: Callable[[], dict] | None):
    params, frozen = split_params(params, groups)
    extra = {} if initial_extra is None else initial_extra()
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), extra)


def boxed_shapes(model: Model) -> dict:
    """Shapes and logical axes of a model's parameters, which the caller must not change; nothing allocated.

    A start needs them in several places, and to trace a model takes tenths of a second.
    """
    return _boxed_shapes(model)  # ty: ignore[invalid-argument-type]  Flax makes its modules hashable at run time


@functools.lru_cache(maxsize=8)
def _boxed_shapes(model: Model) -> dict:
    return jax.eval_shape(lambda: model.init_params(jax.random.key(0)))


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    groups: Sequence[ParameterGroup] = (),
    initial_extra: Callable[[], dict] | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated.

    Args:
      initial_extra: makes the running statistics, as `Objective` says; they are not split over devices.

    Raises:
      ValueError: a parameter's dimension does not divide by its mesh axes, or the groups do not fit the parameters.
    """
    params = boxed_shapes(model)
    split_params(params, groups)  # here, because errors inside a JAX trace are long
    boxed = jax.eval_shape(lambda params: _state_of(params, optimizer, groups, initial_extra), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def initial_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    groups: Sequence[ParameterGroup] = (),
    initial_extra: Callable[[], dict] | None = None,
) -> TrainState:
    """Random parameters and a fresh optimizer state, each shard made where it lies; the same for every mesh."""
    abstract = abstract_state(model, optimizer, mesh, groups, initial_extra)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def unboxed():
        params = model.init_params(jax.random.key(seed))
        return nn.meta.unbox(_state_of(params, optimizer, groups, initial_extra))

    with use_mesh(mesh):
        return jax.jit(unboxed, out_shardings=shardings)()
