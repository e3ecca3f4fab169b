"""Primitives whose gradients are placed by hand: products, weights gathered for use, rows of the embedding.

XLA's own gradients are right, but they sum between devices in float32, or gather before they cast.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.sharding import constrain, has_sparse_cores, num_shards, platform, split_shards, sum_shards

# Rows of a bfloat16 tile of a TPU's memory.
TILE_ROWS = 16


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """Full precision for float32: TPUs and GPUs would otherwise round the factors."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(equation: str, a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
    """Einsum of two arrays of the compute dtype, in `dtype` (by default theirs), summed in float32."""
    dtype = a.dtype if dtype is None else dtype
    # XLA's CPU backend has fast bfloat16 products only with float32 results. Other backends sum in float32 anyway, and
    # float32 results would double the bytes of sums between devices.
    wide = jnp.float32 if platform() == "cpu" else dtype
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), preferred_element_type=wide).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` of an activation and a weight of its dtype, with a backward pass of `product`s."""
    return product(equation, x, weight)


def _project_forward(equation, x, weight):
    return product(equation, x, weight), (x, weight)


def _project_backward(equation, residuals, gradient):
    x, weight = residuals
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    x_gradient = product(f"{result},{of_weight}->{of_x}", gradient, weight)
    return x_gradient, _weight_gradient(of_x, result, of_weight, x, gradient)


def _weight_gradient(of_x: str, of_y: str, of_weight: str, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient of a weight from the activation and the gradient of the result."""
    if platform() != "cpu" or x.size <= gradient.size:
        return product(f"{of_x},{of_y}->{of_weight}", x, gradient)
    # XLA's CPU backend transposes the first factor, within the loop that computes it: `silu(gate) * up` in that order
    # takes ten times as long. So the smaller factor comes first. The barrier keeps XLA from swapping them again.
    inputs, outputs = ("".join(letter for letter in of_weight if letter in letters) for letters in (of_x, of_y))
    swapped = jax.lax.optimization_barrier(product(f"{of_y},{of_x}->{outputs}{inputs}", gradient, x))
    return jnp.einsum(f"{outputs}{inputs}->{of_weight}", swapped)


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight: jax.Array, names: tuple[str, ...], dtype) -> jax.Array:
    """The weight in the compute dtype, whole along the axis that parameters are sharded over.

    The cast precedes the gather, and the gradient is reduced in the compute dtype straight to the shards of the
    parameter: half of float32's bytes both ways.

    Args:
      weight: float32, its dimensions named `names`.

    Returns:
      The same shape in `dtype`.
    """
    # Placed twice, so that the cast stays before the gather.
    cast = constrain(weight.astype(dtype), *names)
    return constrain(cast, *(None if name == "embed" else name for name in names))


def _gather_weight_forward(weight, names, dtype):
    return gather_weight(weight, names, dtype), None


def _gather_weight_backward(names, dtype, residuals, gradient):
    return (constrain(gradient, *names).astype(jnp.float32),)


gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding table in the compute dtype.

    Args:
      table: [vocabulary, hidden] in the compute dtype.
      tokens: int32 [batch, length]; an id outside the vocabulary gives NaN.

    Returns:
      [batch, length, hidden].
    """
    return jnp.take(table, tokens, axis=0)


def _embed_forward(table, tokens):
    return embed(table, tokens), (tokens, table.shape)


def _embed_backward(residuals, gradient):
    """The gradient of the table: summed in float32 on each device, in the compute dtype between devices."""
    tokens, (rows, width) = residuals
    # A reduce-scatter on the SparseCores along the last axis begins with a transposed copy of the whole table (libtpu
    # 0.0.42; 22 ms of 7B on v5p). So whole tiles of rows are scattered, and the shards then change places.
    by_rows = has_sparse_cores() and num_shards("vocab") == 1 and num_shards("embed") > 1
    height = rows + (-rows % (TILE_ROWS * num_shards("embed")) if by_rows else 0)

    def of_shard(tokens, gradient):
        return jnp.zeros((height, width), jnp.float32).at[tokens].add(gradient.astype(jnp.float32))

    summed = jax.vmap(jax.vmap(of_shard, 1), 0)(split_shards(tokens), split_shards(gradient))
    whole = sum_shards(constrain(summed, "batch", "length", "vocab", None), gradient.dtype)
    if by_rows:
        whole = constrain(constrain(whole, "embed", None), None, "embed")[:rows]
    return whole, None


embed.defvjp(_embed_forward, _embed_backward)
