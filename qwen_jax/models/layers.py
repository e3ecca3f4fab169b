"""Norms, projections and SwiGLU, with logical names on every parameter axis."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.lora import LoraConfig, adapter_equations, init_lora_a
from qwen_jax.models.ops import gather_weight, project
from qwen_jax.sharding import constrain, num_shards


def weight_init(std: float, names: tuple[str | None, ...]):
    """Initializer N(0, std) whose result carries logical axis names."""
    return named_init(nn.initializers.normal(std), names)


def named_init(initializer: Callable, names: tuple[str | None, ...]) -> Callable:
    """`initializer` with logical axis names on its result; `Module.param` stores the box and returns its array."""
    return nn.with_logical_partitioning(initializer, names)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast to the activation dtype, then times the weight (as the released code does)."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden] to [..., hidden]."""
        scale = self.param("scale", named_init(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation in float32, times the weight, plus the bias, cast to the activation dtype."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden] to [..., hidden]."""
        scale = self.param("scale", named_init(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        bias = self.param("bias", named_init(nn.initializers.zeros, ("norm",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale + bias).astype(self.dtype)


class Projection(nn.Module):
    """A matrix product by einsum, with an optional bias and adapter; parameters are float32.

    They are `kernel`, `bias`, `lora_a` and `lora_b`.

    Attributes:
      equation: einsum of activation and kernel, whose input axes come first.
      shape: shape of the kernel.
      names: logical names of the kernel's axes.
      std: standard deviation of the initial kernel.
      bias_names: logical names of the bias's axes (the kernel's last ones), or None for no bias.
      bias_shape: shape that makes the bias broadcast to the result; by default its own.
      lora: adapters of the model; there is one here if its targets have the name of this module.
      deterministic: whether the adapter goes without its dropout.
      kernel_init: makes the initial kernel from a random key and the shape, in place of N(0, std).
    """

    equation: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    std: float
    dtype: jnp.dtype
    bias_names: tuple[str | None, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    lora: LoraConfig | None = None
    deterministic: bool = True
    kernel_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the projection in the compute dtype."""
        initializer = self.kernel_init or nn.initializers.normal(self.std)
        kernel = self.param("kernel", named_init(initializer, self.names), self.shape)
        equation, names = self.equation, self.names
        if num_shards("embed") > 1:
            # The gathered axis comes first: the gathered weight then needs no copy into another layout.
            order = sorted(range(len(names)), key=lambda axis: names[axis] != "embed")
            kernel, names = kernel.transpose(order), tuple(names[axis] for axis in order)
            operands, result = equation.split("->")
            of_x, of_kernel = operands.split(",")
            equation = f"{of_x},{''.join(of_kernel[axis] for axis in order)}->{result}"
        gathered = checkpoint_name(gather_weight(kernel, names, self.dtype), f"{self.name}_weight")
        y = project(equation, x, gathered)
        if self.bias_names is not None:
            shape = self.shape[-len(self.bias_names) :]
            bias = self.param("bias", named_init(nn.initializers.zeros, self.bias_names), shape)
            y = y + bias.astype(self.dtype).reshape(self.bias_shape or shape)
        if self.lora is not None and self.name in self.lora.targets:
            y = y + self._adapter(x, self.lora)
        return y

    def _adapter(self, x: jax.Array, lora: LoraConfig) -> jax.Array:
        down, up, inputs = adapter_equations(self.equation)
        a_names, b_names = (*self.names[:inputs], "rank"), ("rank", *self.names[inputs:])
        a = self.param("lora_a", named_init(init_lora_a, a_names), (*self.shape[:inputs], lora.rank), jnp.float32)
        b = self.param(
            "lora_b", named_init(nn.initializers.zeros, b_names), (lora.rank, *self.shape[inputs:]), jnp.float32
        )
        if lora.dropout > 0:
            x = nn.Dropout(lora.dropout)(x, deterministic=self.deterministic)
        inner = project(down, x, gather_weight(a, a_names, self.dtype))
        return lora.scale * project(up, inner, gather_weight(b, b_names, self.dtype))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases. Einsum letters: b batch, l length, d hidden, f FFN width."""

    config: ModelConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, hidden] to [batch, length, hidden]."""
        c = self.config
        projection = functools.partial(Projection, lora=c.lora, deterministic=self.deterministic)
        wide = ((c.hidden_size, c.ffn_size), ("embed", "mlp"), c.init_std, c.compute_dtype)
        gate = checkpoint_name(projection("bld,df->blf", *wide, name="gate")(x), "gate")
        up = checkpoint_name(projection("bld,df->blf", *wide, name="up")(x), "up")
        hidden = constrain(nn.silu(gate) * up, "batch", "length", "mlp")
        shape, names = (c.ffn_size, c.hidden_size), ("mlp", "embed")
        return projection("blf,fd->bld", shape, names, c.output_init_std, c.compute_dtype, name="down")(hidden)
