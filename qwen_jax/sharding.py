"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Models name the axes of their parameters and activations; nothing else of the project decides where they lie.
"""

import contextlib
import contextvars
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# From the axis that exchanges least to the one that exchanges most: the last one gets the nearest devices.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Parameters and activations have separate names for the model width: a parameter is sharded over `fsdp` and `sequence`
# along it, an activation is not, because its batch and its length already are.
RULES = {
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "embed": ("fsdp", "sequence"),
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
# True while what one copy of the parameters does is traced: `data` is then no axis of its arrays.
_one_copy: contextvars.ContextVar[bool] = contextvars.ContextVar("qwen_jax_one_copy", default=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes the devices that the others leave.

    docs/parallelism.md says what each costs and when to use it.

    data: copies of the parameters; they exchange gradients once per step, and nothing else. The only axis that may span
      several slices, which only a data-centre network joins.
    fsdp: the rows of a batch, the parameters and the optimizer state are split over it.
    tensor: heads, FFN width and vocabulary are split over it.
    sequence: the tokens of each row (context parallelism), the parameters and the optimizer state are split over it.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Arranges the devices (all of the job's by default) as `config` says.

    Devices of several slices are told by their `slice_index`; each slice then holds whole copies of the parameters. For
    GPUs JAX calls every node a slice: there parameters may be split over nodes, too.

    Raises:
      ValueError: the axes do not multiply to the number of devices, `data` does not divide by the number of slices of
        TPUs, or no arrangement follows the links between the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if not all(type(size) is int and size >= -1 and size for size in sizes.values()) or [*sizes.values()].count(-1) > 1:
        raise ValueError(f"mesh {text}: each axis must be an integer of at least 1, and at most one of them may be -1")
    known = math.prod(size for size in sizes.values() if size > 0)
    for axis, size in sizes.items():
        if size == -1 and len(devices) % known == 0:
            sizes[axis] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {text} does not divide {len(devices)} device(s): make the product of MeshConfig.data, .fsdp, "
            f".sequence and .tensor equal to {len(devices)}, or set one of them to -1"
        )
    try:
        arranged = _arrange(sizes, devices, text)
    except NotImplementedError as error:  # mesh_utils' word for "no such arrangement"
        raise ValueError(f"mesh {text} does not follow the links between {len(devices)} devices: {error}") from error
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes: dict[str, int], devices, text: str) -> np.ndarray:
    """The devices in an array with one dimension per mesh axis, neighbours beside each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices and devices[0].platform != "tpu":
        near_first = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return np.asarray(near_first).reshape(*sizes.values())
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh {text} on {slices} slices: parameters are gathered within a slice only, so MeshConfig.data must be "
            f"a multiple of {slices}"
        )
    within = [sizes["data"] // slices, *(sizes[axis] for axis in MESH_AXES[1:])]

    def arrange(**options):
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, **options)
        across = [slices] + [1] * (len(MESH_AXES) - 1)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, **options)

    try:
        return arrange()
    except NotImplementedError:
        # One dimension of the torus for two mesh axes: fewer links for each, but an arrangement.
        return arrange(allow_split_physical_axes=True)


def spec(names) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names (None: not sharded)."""

    def axes_of(name):
        axes = None if name is None else RULES[name]
        if _one_copy.get() and isinstance(axes, tuple):
            axes = tuple(axis for axis in axes if axis != "data")
        return axes

    return PartitionSpec(*map(axes_of, names))


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Within it, `constrain` places activations on `mesh`. Must be active while a function is traced."""
    token = _mesh.set(mesh)
    try:
        yield mesh
    finally:
        _mesh.reset(token)


def mesh_in_use() -> Mesh | None:
    """The mesh of the innermost `use_mesh`, or None."""
    return _mesh.get()


def platform() -> str:
    """Of the devices that a function is traced for: "tpu", "gpu" or "cpu"."""
    mesh = _mesh.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def num_shards(name: str) -> int:
    """Into how many parts the mesh in use splits an axis of this logical name; 1 without a mesh."""
    mesh = _mesh.get()
    return 1 if mesh is None else _num_shards(spec((name,))[0], mesh)


def _num_shards(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def apart(x: jax.Array) -> jax.Array:
    """[batch, length, ...] as [row shards, rows, length shards, positions, ...]: what lies on different devices apart.

    Sums over rows and positions then stay on their devices, until `sum_shards` adds them up once.
    """
    row_shards, length_shards = num_shards("batch"), num_shards("length")
    batch, length, *rest = x.shape
    x = x.reshape(row_shards, batch // row_shards, length_shards, length // length_shards, *rest)
    return constrain(x, "batch", None, "length", None, *[None] * len(rest))


def sum_shards(x: jax.Array, dtype) -> jax.Array:
    """The sum over the first two axes of [row shards, length shards, ...]: between devices, and so in `dtype`."""
    # jnp.sum would add in float32, twice the bytes.
    return jax.lax.reduce(x.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0, 1))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Places activation `x`, whose dimensions have these logical names, on the mesh in use, if there is one."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))


def sum_over_replicas(function):
    """`function` computed by each copy of the parameters on its own rows, then summed over the copies.

    Whatever `function` gathers or reduces stays among the devices of one copy. The sum is the one exchange between
    copies, which may lie in different slices, and it is one of sharded arrays. Left to itself, XLA sums gradients over
    all devices at once, unsharded, and so in every accumulation step. Without copies it is `function` itself.

    Args:
      function: `(params, batch, rng) -> pytree` of sums over the rows; rows are the first dimension of the batch's
        arrays. The key, if there is one, differs between copies.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.shape["data"] == 1:
        return function
    copies = mesh.shape["data"]

    def of_all_copies(params, batch, rng):
        def split(x):
            placed = NamedSharding(mesh, PartitionSpec("data", *spec(("batch", "length"))))
            return jax.lax.with_sharding_constraint(x.reshape(copies, x.shape[0] // copies, *x.shape[1:]), placed)

        token = _one_copy.set(True)
        try:
            rngs = None if rng is None else jax.random.split(rng, copies)
            sums = jax.vmap(function, in_axes=(None, 0, 0), spmd_axis_name="data")(
                params, jax.tree.map(split, batch), rngs
            )
        finally:
            _one_copy.reset(token)
        return jax.tree.map(lambda x: x.sum(axis=0), sums)

    return of_all_copies


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
            ways = _num_shards(axes, mesh)
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


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
