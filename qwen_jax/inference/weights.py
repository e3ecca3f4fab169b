"""The engine's weights: parameters of a model in the compute dtype, block by block, shared where they can be."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.inference import programs
from qwen_jax.inference.programs import Programs
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import tree_shardings


def prepare(model: Qwen, params, call: Programs) -> dict:
    """Parameters as decoding reads them.

    An array that already has the compute dtype and lies where it should is shared, not copied. Those are the embedding,
    the output projection and the final norm of a model in its compute dtype, and the blocks if they come unstacked.

    Args:
      params: as `load_pretrained` returns them, as a training state holds them, or as this function does.
      call: runs the programs, on the devices where the weights are to lie.

    Returns:
      A pytree as `unstack_layers` gives it.

    Raises:
      ValueError: they are not of this model.
    """
    config = model.config
    boxed = abstract_params(model)
    unstacked = _unstacked(boxed, config.num_layers)
    stacked = not (isinstance(params, dict) and isinstance(params.get("layers"), tuple | list))
    expected = boxed if stacked else unstacked
    if not stacked:
        params = {**params, "layers": tuple(params["layers"])}
    _check(params, nn.meta.unbox(expected))
    # Placed in either case: JAX compiles anew for arrays that could lie elsewhere, such as NumPy's.
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = jax.device_put(params, one_device if call.mesh is None else tree_shardings(expected, call.mesh))
    changed = {
        name: part
        for name, part in params.items()
        if (name == "layers" and stacked) or any(leaf.dtype != config.compute_dtype for leaf in jax.tree.leaves(part))
    }
    if not changed:
        return params
    names = tuple(
        (jax.tree_util.keystr(path), box.names)
        for path, box in jax.tree_util.tree_leaves_with_path(unstacked, is_leaf=_is_box)
    )
    return {**params, **call(programs.prepare, ("prepare weights",), config, names, changed)}


def _is_box(node) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


def _unstacked(boxed, num_layers: int) -> dict:
    """Shapes and logical names of the parameters as `unstack_layers` gives them."""
    layer = jax.tree.map(
        lambda box: box.replace(value=jax.ShapeDtypeStruct(box.value.shape[1:], box.value.dtype), names=box.names[1:]),
        boxed["layers"],
        is_leaf=_is_box,
    )
    return {**boxed, "layers": (layer,) * num_layers}


def _check(params, expected) -> None:
    """Raises ValueError where `params` is not a tree of floating-point arrays of these shapes."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"the parameters have no {missing[0]} ({len(missing)} are missing): are they of this model?")
    if extra := [name for name in found if name not in wanted]:
        raise ValueError(f"the parameters have {extra[0]}, which the model has not: are they of this model?")
    for name, leaf in found.items():
        if tuple(leaf.shape) != wanted[name].shape:
            raise ValueError(
                f"parameter {name} is {list(leaf.shape)}, the model's configuration makes it {list(wanted[name].shape)}"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"parameter {name} is {leaf.dtype}, expected floating-point weights")
