"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Models name the axes of their parameters and activations; nothing else of the project decides where they lie.
"""

import contextlib
import contextvars
import dataclasses

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters and activations have separate names for the model width: a parameter is sharded over `fsdp` along it, an
# activation is not, because its batch dimension already is.
RULES = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
    "activation_embed": None,
}

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("qwen_jax_mesh", default=None)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes the devices that the others leave.

    data: copies of the model; each reduces gradients with the others.
    fsdp: parameters, optimizer state and batch are split over it.
    tensor: heads, FFN width and vocabulary are split over it.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Arranges the devices (all of the job's by default) as `config` says.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh {text}: each axis must be at least 1, and at most one of them may be -1")
    known = int(np.prod([size for size in sizes if size > 0]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {text} does not divide {len(devices)} device(s): make the product of MeshConfig.data, .fsdp and "
            f".tensor equal to {len(devices)}, or set one of them to -1"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(names) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names (None: not sharded)."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Within it, `constrain` places activations on `mesh`. Must be active while a function is traced."""
    token = _mesh.set(mesh)
    try:
        yield mesh
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Places activation `x`, whose dimensions have these logical names, on the mesh in use, if there is one."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))


def tree_shardings(boxed, mesh: Mesh):
    """The NamedSharding of every leaf of a pytree of shapes whose parameters still carry their logical names.

    Args:
      boxed: pytree of `jax.ShapeDtypeStruct`, some in `nn.LogicallyPartitioned` boxes, as `jax.eval_shape` of an
        initialiser gives. Leaves without a box are replicated.

    Raises:
      ValueError: a dimension does not divide by the mesh axes that it lies on.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        placed = spec(names)
        for size, name, axes in zip(shape, names, placed, strict=False):
            ways = int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))
            if size % ways:
                raise ValueError(
                    f"the mesh does not divide the model: {jax.tree_util.keystr(path)} has {size} along {name!r}, "
                    f"which lies on mesh axis {axes!r} of {ways} devices; choose MeshConfig axes that divide {size}"
                )
        return NamedSharding(mesh, placed)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [batch, length] arrays: rows over data and fsdp."""
    return NamedSharding(mesh, spec(("batch", "length")))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
