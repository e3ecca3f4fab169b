"""RMSNorm, projections and SwiGLU, with logical names on every parameter axis."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.models.config import ModelConfig
from qwen_jax.sharding import apart, constrain, platform, sum_shards, ways


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """Float32 compute means float32 products: TPUs and GPUs would otherwise round the factors."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(equation: str, a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
    """Einsum of two arrays of the compute dtype, in `dtype` (by default theirs), added up in float32."""
    dtype = a.dtype if dtype is None else dtype
    # XLA's CPU backend has fast bfloat16 products only with float32 results. Elsewhere they are what is added up
    # anyway, and asking for them would let sums between devices take twice the bytes.
    wide = jnp.float32 if platform() == "cpu" else dtype
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), preferred_element_type=wide).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`product` of an activation and a weight of its dtype, whose backward pass is made of `product`s, too."""
    return product(equation, x, weight)


def _project_forward(equation, x, weight):
    return product(equation, x, weight), (x, weight)


def _project_backward(equation, residuals, gradient):
    x, weight = residuals
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    x_gradient = product(f"{result},{of_weight}->{of_x}", gradient, weight)
    return x_gradient, product(f"{of_x},{result}->{of_weight}", x, gradient)


project.defvjp(_project_forward, _project_backward)


def weight_init(std: float, names: tuple[str, ...]):
    """Initialiser N(0, std) whose result carries logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight: jax.Array, names: tuple[str, ...], dtype) -> jax.Array:
    """The weight in the compute dtype, whole along the axis that parameters are sharded over.

    It is cast before it is gathered, and its gradient is reduced in the compute dtype straight to where the parameter
    lies: half of float32's bytes both ways.

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
    """Added up in float32 on each device, and in the compute dtype between devices, as any weight's gradient."""
    tokens, shape = residuals

    def of_shard(tokens, gradient):
        return jnp.zeros(shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))

    summed = jax.vmap(jax.vmap(of_shard, 1), 0)(apart(tokens), apart(gradient))
    return sum_shards(constrain(summed, "batch", "length", "vocab", None), gradient.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast to the activation dtype, then times the weight (as the released code does)."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden] to [..., hidden]."""
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class Projection(nn.Module):
    """A matrix product by einsum, with an optional bias; parameters `kernel` and `bias` in float32.

    Attributes:
      equation: einsum of activation and kernel.
      shape: shape of the kernel.
      names: logical names of the kernel's axes.
      std: standard deviation of the initial kernel.
      bias_names: logical names of the bias's axes (the kernel's last ones), or None for no bias.
      bias_shape: how the bias is shaped to be added to the result; by default as it is.
    """

    equation: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    std: float
    dtype: jnp.dtype
    bias_names: tuple[str, ...] | None = None
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the projection in the compute dtype."""
        kernel = self.param("kernel", weight_init(self.std, self.names), self.shape)
        equation, names = self.equation, self.names
        if ways("embed") > 1:
            # The axis that is gathered first: the whole then lies in memory as it is read, and needs no copy.
            order = sorted(range(len(names)), key=lambda axis: names[axis] != "embed")
            kernel, names = kernel.transpose(order), tuple(names[axis] for axis in order)
            operands, result = equation.split("->")
            of_x, of_kernel = operands.split(",")
            equation = f"{of_x},{''.join(of_kernel[axis] for axis in order)}->{result}"
        y = project(equation, x, gather_weight(kernel, names, self.dtype))
        if self.bias_names is not None:
            shape = self.shape[-len(self.bias_names) :]
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.bias_names), shape)
            y = y + bias.astype(self.dtype).reshape(self.bias_shape or shape)
        return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, hidden] to [batch, length, hidden]."""
        c = self.config
        wide = ((c.hidden_size, c.ffn_size), ("embed", "mlp"), c.init_std, c.compute_dtype)
        gate = checkpoint_name(Projection("bld,df->blf", *wide, name="gate")(x), "gate")
        up = checkpoint_name(Projection("bld,df->blf", *wide, name="up")(x), "up")
        hidden = constrain(nn.silu(gate) * up, "batch", "length", "mlp")
        shape, names = (c.ffn_size, c.hidden_size), ("mlp", "embed")
        return Projection("blf,fd->bld", shape, names, c.output_init_std, c.compute_dtype, name="down")(hidden)
