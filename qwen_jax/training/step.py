"""The train step and the evaluation step: pure functions, compiled ahead of time, once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import batch_sharding, constrain, num_batch_shards, sum_over_replicas, use_mesh
from qwen_jax.training.parameter_groups import merge_params
from qwen_jax.training.resilience import skip_metrics, updates_made
from qwen_jax.training.state import TrainState


def _sum_over_parts(function: Callable, accumulation: int, batch, rng):
    """Sum of `function(part, rng)`, a pytree, over `accumulation` parts of the batch, of equal size."""
    if accumulation == 1:
        return function(batch, rng)

    def split(x):
        # Every part takes rows from every device, so that no row moves between devices.
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))

    def add_part(totals, xs):
        part, index = xs
        part_rng = None if rng is None else jax.random.fold_in(rng, index)
        return jax.tree.map(jnp.add, totals, function(part, part_rng)), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (parts, jnp.arange(accumulation)))[0]


def _sums(objective, model, params, batch, rng):
    """The objective's sum and, in a dict with "loss" among them, all its sums."""
    loss, sums = objective(model, params, batch, rng)
    return loss, {"loss": loss, **sums}


def make_train_step(
    model: Qwen,
    optimizer: optax.GradientTransformation,
    objective: Callable,
    rates: Callable[[jax.Array], dict[str, jax.Array]],
    *,
    seed: int,
    accumulation: int = 1,
) -> Callable:
    """The function `(state, batch) -> (state, metrics)`; metrics are scalars.

    The update is that of the mean loss over the whole batch, whatever `accumulation` is. Dropout, when the model has
    any, depends on (seed, step) alone. Frozen parameters have no gradient.

    Args:
      rates: learning rates for the metrics, as a function of the updates made (`optimizer.learning_rates`).
    """
    dropout = model.config.embedding_dropout > 0 or model.config.attention_dropout > 0

    def gradients(params_and_frozen, batch, rng):
        params, frozen = params_and_frozen

        def of_part(part, rng):
            (_, sums), gradient = jax.value_and_grad(
                lambda params: _sums(objective, model, merge_params(params, frozen), part, rng), has_aux=True
            )(params)
            return sums, gradient

        return _sum_over_parts(of_part, accumulation, batch, rng)

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        sums, gradient = sum_over_replicas(gradients)((state.params, state.frozen), batch, rng)
        weight = jnp.maximum(sums["weight"], 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": sums["loss"] / weight,
            "accuracy": sums["correct"] / weight,
            "gradient_norm": optax.global_norm(gradient),
            **rates(updates_made(state.opt_state, state.step)),
            **skip_metrics(opt_state),
        }
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def batch_shapes(mesh: Mesh, batch_size: int, length: int, accumulation: int = 1, columns=()) -> dict:
    """Shapes of a global batch, placed on the mesh.

    Args:
      columns: names of further int32 columns, such as "segment_ids".

    Raises:
      ValueError: the batch does not divide by the accumulation steps and the mesh.
    """
    ways = num_batch_shards(mesh) * accumulation
    if batch_size % ways:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide into {accumulation} accumulation step(s) on "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}: set BATCH_SIZE to a multiple of {ways}"
        )
    if length % mesh.shape["sequence"]:
        raise ValueError(
            f"rows of {length} tokens do not divide over sequence={mesh.shape['sequence']}: set SEQUENCE_LENGTH to a "
            f"multiple of it"
        )
    sharding = batch_sharding(mesh)
    dtypes = {"tokens": jnp.int32, "loss_weights": jnp.float32, **dict.fromkeys(columns, jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct((batch_size, length), dtype, sharding=sharding) for name, dtype in dtypes.items()
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


def compile_eval_step(model: Qwen, objective: Callable, params, batch, mesh: Mesh, accumulation: int = 1):
    """Compiles `(params, batch) -> sums` of the objective without dropout, `"loss"` among them.

    Args:
      accumulation: parts that the batch is computed in, as in training: what fits there fits here.
    """

    def eval_step(params, batch):
        def of_part(part, _):
            return _sums(objective, model, params, part, None)[1]

        return _sum_over_parts(of_part, accumulation, batch, None)

    shardings = jax.tree.map(lambda x: x.sharding, (params, batch))
    replicated = NamedSharding(mesh, PartitionSpec())
    with use_mesh(mesh):
        return jax.jit(eval_step, in_shardings=shardings, out_shardings=replicated).lower(params, batch).compile()
