"""The state of a run, created and restored sharded: no host or device ever holds the whole of it."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import tree_shardings, use_mesh


@flax.struct.dataclass
class TrainState:
    """step: int32, updates made; params: float32 pytree; opt_state: the optimizer's pytree."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def _initialiser(model: Qwen, optimizer: optax.GradientTransformation, seed: int):
    def initialise() -> TrainState:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return initialise


def abstract_state(model: Qwen, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated.

    Raises:
      ValueError: a parameter's dimension does not divide by its mesh axes.
    """
    boxed = jax.eval_shape(_initialiser(model, optimizer, 0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def initial_state(model: Qwen, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """Random parameters and a fresh optimizer state, each shard made where it lies; the same for every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))

    def unboxed():
        return nn.meta.unbox(_initialiser(model, optimizer, seed)())

    with use_mesh(mesh):
        return jax.jit(unboxed, out_shardings=shardings)()
