"""The device mesh, and the table that maps logical axes to mesh axes.

Models name the axes of their parameters and activations. This module alone decides how those are sharded.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Ordered by traffic: `data` exchanges least, `tensor` most, so `tensor` gets the nearest devices.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# The model width has two names. `embed` of a parameter is sharded over `fsdp` and `sequence`; `activation_embed` is
# not sharded, because those axes already shard the batch and the length of an activation.
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
    "rank": None,
    "layers": None,
    "activation_embed": None,
}

# Without SparseCores, or with such as run no collectives.
_NO_SPARSE_CORE_COLLECTIVES = ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5e")

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("qwen_jax_mesh", default=None)
# True while `sum_over_replicas` traces one replica: `data` is then no axis of its arrays.
_one_replica: contextvars.ContextVar[bool] = contextvars.ContextVar("qwen_jax_one_replica", default=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis. One axis may be -1: it takes the remaining devices.

    docs/reference/parallelism.md gives the cost and the use of each axis.

    Attributes:
      data: replicas of the parameters, which exchange gradients once per step and nothing else. The only axis that may
        span several slices, which a data-center network joins.
      fsdp: shards the rows of a batch, the parameters and the optimizer state.
      tensor: shards heads, FFN width and vocabulary.
      sequence: shards the tokens of each row (context parallelism), the parameters and the optimizer state.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Arranges the devices (by default all devices of the job) as `config` says.

    `slice_index` of a device tells the slices apart; each slice of TPUs holds whole replicas of the parameters.
    JAX calls each node of GPUs a slice: parameters may be sharded over nodes.

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
    except NotImplementedError as error:  # mesh_utils raises it where no arrangement exists
        raise ValueError(f"mesh {text} does not follow the links between {len(devices)} devices: {error}") from error
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes: dict[str, int], devices, text: str) -> np.ndarray:
    """The devices in an array with one dimension per mesh axis, neighbors beside each other."""
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
        # Two mesh axes share one dimension of the torus: fewer links for each.
        return arrange(allow_split_physical_axes=True)


def spec(names) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names (None: not sharded)."""

    def axes_of(name):
        axes = None if name is None else RULES[name]
        if _one_replica.get() and isinstance(axes, tuple):
            axes = tuple(axis for axis in axes if axis != "data")
        return axes

    return PartitionSpec(*map(axes_of, names))


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Makes `constrain` place activations on `mesh`. Must be open while a function is traced."""
    token = _mesh.set(mesh)
    try:
        yield mesh
    finally:
        _mesh.reset(token)


def mesh_in_use() -> Mesh | None:
    """The mesh of the innermost `use_mesh`, or None."""
    return _mesh.get()


def platform() -> str:
    """Platform of the devices that a function is traced for: "tpu", "gpu" or "cpu"."""
    mesh = _mesh.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def has_sparse_cores() -> bool:
    """Whether a function is traced for TPUs with SparseCores, which run collectives: v5p, v6e and v7."""
    mesh = _mesh.get()
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "tpu" and device.device_kind not in _NO_SPARSE_CORE_COLLECTIVES


def num_shards(name: str) -> int:
    """Number of shards of a logical axis on the mesh in use; 1 without a mesh."""
    mesh = _mesh.get()
    return 1 if mesh is None else _num_shards(spec((name,))[0], mesh)


def _num_shards(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def split_shards(x: jax.Array) -> jax.Array:
    """Reshapes [batch, length, ...] to [row shards, rows, length shards, positions, ...].

    Sums over rows and positions then stay on their devices, until `sum_shards` adds the shards once.
    """
    row_shards, length_shards = num_shards("batch"), num_shards("length")
    batch, length, *rest = x.shape
    x = x.reshape(row_shards, batch // row_shards, length_shards, length // length_shards, *rest)
    return constrain(x, "batch", None, "length", None, *[None] * len(rest))


def sum_shards(x: jax.Array, dtype) -> jax.Array:
    """Sum over the first two axes of [row shards, length shards, ...], which are devices, computed in `dtype`."""
    # jnp.sum would add in float32 and so move twice the bytes.
    return jax.lax.reduce(x.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0, 1))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Places activation `x`, whose dimensions have these logical names, on the mesh in use, if any."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))


def sum_over_replicas(function, axes: Mapping[str, Sequence[str | None]]):
    """Wraps `function`: each replica of the parameters computes it on its own rows, and the results are summed.

    Gathers and reductions of `function` stay within one replica. The sum of sharded arrays is the only exchange between
    replicas, which may be in different slices. XLA alone would sum unsharded gradients over all devices, and do so in
    every accumulation step. With one replica, it returns `function` itself.

    Args:
      function: `(params, batch, rng) -> pytree` of sums over the rows, the first dimension of the arrays of the batch.
        The key, if any, differs between replicas.
      axes: name of each array of the batch to the logical names of its other dimensions.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.shape["data"] == 1:
        return function
    replicas = mesh.shape["data"]

    def of_all_replicas(params, batch, rng):
        def split(name, x):
            placed = NamedSharding(mesh, PartitionSpec("data", *spec(("batch", *axes[name]))))
            return jax.lax.with_sharding_constraint(x.reshape(replicas, x.shape[0] // replicas, *x.shape[1:]), placed)

        token = _one_replica.set(True)
        try:
            rngs = None if rng is None else jax.random.split(rng, replicas)
            sums = jax.vmap(function, in_axes=(None, 0, 0), spmd_axis_name="data")(
                params, {name: split(name, x) for name, x in batch.items()}, rngs
            )
        finally:
            _one_replica.reset(token)
        return jax.tree.map(lambda x: x.sum(axis=0), sums)

    return of_all_replicas


def tree_shardings(boxed, mesh: Mesh):
    """NamedSharding of every leaf of a pytree of shapes whose parameters carry their logical names.

    Args:
      boxed: pytree of `jax.ShapeDtypeStruct`, some in `nn.LogicallyPartitioned` boxes, as `jax.eval_shape` of an
        initializer gives. Leaves without a box are replicated.

    Raises:
      ValueError: a dimension does not divide by the mesh axes that it lies on.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        value = nn.meta.unbox(leaf)
        if not jax.tree.leaves(value):  # in the state of a parameter group: the place of another group's parameter
            return value
        shape = value.shape
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


def batch_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of [batch, …] arrays, rows over data and fsdp; `axes` are the logical names of the other dimensions."""
    return NamedSharding(mesh, spec(("batch", *axes)))


def axis_shards(name: str | None, mesh: Mesh) -> int:
    """Number of shards of a logical axis on `mesh`."""
    return _num_shards(spec((name,))[0], mesh)


def num_batch_shards(mesh: Mesh) -> int:
    """Number of shards of the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
