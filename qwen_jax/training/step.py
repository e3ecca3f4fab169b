"""The train step and the evaluation step: pure functions, compiled ahead of time, once."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.batch_spec import Column, logical_axes
from qwen_jax.sharding import axis_shards, batch_sharding, constrain, num_batch_shards, sum_over_replicas, use_mesh
from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective
from qwen_jax.training.parameter_groups import merge_params
from qwen_jax.training.resilience import skip_metrics, updates_made
from qwen_jax.training.state import TrainState


def _sum_over_parts(function: Callable, accumulation: int, batch: dict, rng, columns: Sequence[Column]):
    """Sum of `function(part, rng)`, a pytree, over `accumulation` parts of the batch, of equal size."""
    if accumulation == 1:
        return function(batch, rng)

    axes = logical_axes(columns)

    def split(name, x):
        # Every part takes rows from every device, so that no row moves between devices.
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *axes[name])

    def add_part(totals, xs):
        part, index = xs
        part_rng = None if rng is None else jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, totals, function(part, part_rng)), None

    parts = {name: split(name, x) for name, x in batch.items()}
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (parts, jnp.arange(accumulation)))[0]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    rates: Callable[[jax.Array], dict[str, jax.Array]],
    columns: Sequence[Column],
    *,
    seed: int,
    accumulation: int = 1,
) -> Callable:
    """The function `(state, batch) -> (state, metrics)`; metrics are scalars.

    The update is that of the mean loss over the whole batch, for any `accumulation`. Dropout, when the model has
    any, depends on (seed, step) alone. Frozen parameters have no gradient.

    Args:
      rates: learning rates for the metrics, as a function of the updates made (`optimizer.learning_rates`).
      columns: of the batch.
    """

    def gradients(arguments, batch, rng):
        params, frozen, extra = arguments

        def of_part(part, rng):
            (_, sums), gradient = jax.value_and_grad(
                lambda params: objective.sums(model, merge_params(params, frozen), part, rng, extra), has_aux=True
            )(params)
            return sums, gradient

        return _sum_over_parts(of_part, accumulation, batch, rng, columns)

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if model.has_dropout else None
        arguments = (state.params, state.frozen, state.extra)
        sums, gradient = sum_over_replicas(gradients, logical_axes(columns))(arguments, batch, rng)
        weight = jnp.maximum(sums["weight"], 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": sums["loss"] / weight,
            **objective.summarize(sums | {"weight": weight}),
            **{name: sums[name] for name in objective.counts if name in sums},
            "gradient_norm": optax.global_norm(gradient),
            **rates(updates_made(state.opt_state, state.step)),
            **skip_metrics(opt_state),
        }
        params = optax.apply_updates(state.params, updates)
        extra = state.extra if objective.update_extra is None else objective.update_extra(state.extra, sums)
        new_state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return new_state, metrics

    return train_step


def batch_shapes(mesh: Mesh, batch_size: int, columns: Sequence[Column], accumulation: int = 1) -> dict:
    """Shapes of a global batch, placed on the mesh.

    Returns:
      Name of each column to the ShapeDtypeStruct of [batch_size, *shape of a row].

    Raises:
      ValueError: the batch does not divide by the accumulation steps and the mesh, or a row by the mesh.
    """
    ways = num_batch_shards(mesh) * accumulation
    if batch_size % ways:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide into {accumulation} accumulation step(s) on "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}: set BATCH_SIZE to a multiple of {ways}"
        )
    for column in columns:
        for size, axis in zip(column.shape, column.axes, strict=True):
            if size % axis_shards(axis, mesh) == 0:
                continue
            if axis == "length":
                raise ValueError(
                    f"rows of {size} tokens do not divide over sequence={mesh.shape['sequence']}: set SEQUENCE_LENGTH "
                    f"to a multiple of it"
                )
            raise ValueError(
                f"column {column.name!r} has {size} along {axis!r}, which lies on {axis_shards(axis, mesh)} devices: "
                f"choose MeshConfig axes that divide {size}"
            )
    return {
        column.name: jax.ShapeDtypeStruct(
            (batch_size, *column.shape), jnp.dtype(column.dtype), sharding=batch_sharding(mesh, column.axes)
        )
        for column in columns
    }


def compile_train_step(train_step: Callable, state, batch, mesh: Mesh, compiler_options: dict | None = None):
    """Compiles the step for these shapes and shardings; the state is donated.

    Args:
      state, batch: pytrees of arrays or of ShapeDtypeStructs with shardings.
      compiler_options: XLA's, by name; hardware files set them.

    Returns:
      A compiled function. Called with other shapes it raises instead of compiling again.

    Raises:
      ValueError: the compiler for these devices does not take the options.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (state, batch))
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(train_step, in_shardings=shardings, out_shardings=(shardings[0], replicated), donate_argnums=0)
    with use_mesh(mesh):
        lowered = jitted.lower(state, batch)
    try:
        return lowered.compile(compiler_options=dict(compiler_options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "compile option" not in str(error) and "While setting option" not in str(error):
            raise
        raise ValueError(
            f"train.compiler_options do not suit {mesh.devices.flat[0].device_kind}: {error}. Use the file of "
            f"gin/hardware/ that is for these devices"
        ) from error


def compile_eval_step(
    model: Model,
    objective: Objective,
    state: TrainState,
    batch,
    columns: Sequence[Column],
    mesh: Mesh,
    accumulation: int = 1,
):
    """Compiles `(params, extra, batch) -> sums` of the objective without dropout, `"loss"` among them.

    Args:
      state, batch: pytrees of arrays or of ShapeDtypeStructs with shardings.
      accumulation: parts that the batch is computed in, as in training, so that evaluation needs no more memory.
    """

    def eval_step(params, extra, batch):
        def of_part(part, _):
            return objective.sums(model, params, part, None, extra)[1]

        return _sum_over_parts(of_part, accumulation, batch, None, columns)

    arguments = (state.all_params, state.extra, batch)
    shardings = jax.tree.map(lambda x: x.sharding, arguments)
    replicated = NamedSharding(mesh, PartitionSpec())
    with use_mesh(mesh):
        return jax.jit(eval_step, in_shardings=shardings, out_shardings=replicated).lower(*arguments).compile()
