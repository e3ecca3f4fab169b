"""The decoder with a key-value cache: the blocks of transformer.py one after the other, each with its own weights.

Training scans over blocks, so that compilation does not grow with depth. A decoding step does little work for each
weight: to cut a block out of the stack, which copies its weights, would take as long again. So the weights of each
block are arrays of their own here.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.branches import Branches
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.layers import RMSNorm
from qwen_jax.models.ops import gather_weight
from qwen_jax.models.positions import ContextExtension, dynamic_ntk_alpha
from qwen_jax.models.transformer import Block, InputEmbeddings, Qwen, decoder_states, embed_inputs
from qwen_jax.sharding import mesh_in_use


def unstack_layers(params, num_layers: int) -> dict:
    """Parameters of `Qwen` with `layers` as a tuple of `num_layers` trees, one for each block."""
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(num_layers))
    return {**params, "layers": layers}


@flax.struct.dataclass
class DecodingCache:
    """Keys and values of the tokens so far.

    layers: a KVCache for each block.
    ntk_alpha: float32 [batch], the factor of the rotary base by the length of each row's prompt. Its keys are rotated
      with it, so decoding keeps it.
    """

    layers: tuple[KVCache, ...]
    ntk_alpha: jax.Array

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, prompt_lengths: jax.Array | None = None
    ) -> "DecodingCache":
        """A cache of zeros for `batch` rows of at most `slots` positions.

        Args:
          prompt_lengths: int32 [batch], without padding; only a model with dynamic NTK needs them.

        Raises:
          ValueError: the model needs them, and there are none.
        """
        alpha = jnp.ones(batch, jnp.float32)
        if config.use_dynamic_ntk:
            if prompt_lengths is None:
                raise ValueError("dynamic NTK depends on the prompt: give DecodingCache.empty the rows' prompt_lengths")
            alpha = dynamic_ntk_alpha(prompt_lengths, config.context_length)
        return cls(tuple(KVCache.empty(config, batch, slots) for _ in range(config.num_layers)), alpha)

    @property
    def slots(self) -> int:
        """Number of positions of a row."""
        return self.layers[0].slots


# Inlined, so that the program is the same as without it: XLA rounds bfloat16 elsewhere around calls.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _block(config: ModelConfig, mesh, weights, carry, layer, *inputs):
    """One block; within a larger program it is traced once for all layers.

    Args:
      mesh: the one in use, which the trace depends on.
    """
    del mesh
    return Block(config, deterministic=True).apply({"params": weights}, carry, layer, *inputs)


def single_blocks(config: ModelConfig, layers) -> Iterator:
    """The blocks that `decoder_states` calls one after the other.

    Args:
      layers: parameters of each block, in their order; a generator may make them as they are needed.
    """
    return (functools.partial(_block, config, mesh_in_use(), weights) for weights in layers)


def norm_with(config: ModelConfig, params):
    """The final norm with its parameters, as a function of hidden states."""
    return functools.partial(RMSNorm(config.norm_epsilon, config.compute_dtype).apply, {"params": params})


def decode(
    config: ModelConfig,
    params,
    tokens: jax.Array,
    starts: jax.Array,
    cache: DecodingCache,
    embeddings: InputEmbeddings | None = None,
) -> tuple[jax.Array, DecodingCache]:
    """One inference-mode step: a whole prompt, or the token after it.

    A position sees every slot of its row up to itself, so slots that hold padding must be overwritten before a later
    position can see them.

    Args:
      config: of the model; context extension (report 2.3.2) acts as it says.
      params: as `unstack_layers` gives them, in the compute dtype or any other.
      tokens: int32 [batch, length].
      starts: int32 [batch], the position of each row's first token; start + length must be within the cache's slots.
      cache: of the tokens before.
      embeddings: vectors in the place of some of the tokens' embeddings.

    Returns:
      (normed final hidden states [batch, length, hidden], the cache with the new positions).
      `Qwen.logits` makes logits of the first.
    """
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    mask = jnp.arange(cache.slots)[None, None, :] <= positions[:, :, None]
    return _decode(config, params, tokens, positions, mask, cache, embeddings)


def decode_branches(
    config: ModelConfig,
    params,
    tokens: jax.Array,
    positions: jax.Array,
    ends: jax.Array,
    cache: DecodingCache,
    embeddings: InputEmbeddings | None = None,
) -> tuple[jax.Array, DecodingCache]:
    """One inference-mode step over several texts that go on after the same tokens, side by side in a row.

    Args:
      config, params: as in `decode`.
      tokens: int32 [batch, length].
      positions: int32 [batch, length], of each token in its text; that of the first one is how many the cache holds.
      ends: int32 [batch, length], see `Branches`.
      cache: of the tokens before, with slots for those of the step, which they fill in the order of the row.
      embeddings: as in `decode`.

    Returns:
      As `decode`.
    """
    return _decode(config, params, tokens, positions, Branches(positions[:, 0], ends), cache, embeddings)


def _decode(config, params, tokens, positions, mask, cache, embeddings) -> tuple[jax.Array, DecodingCache]:
    table = gather_weight(params["token_embedding"], ("vocab", "embed"), config.compute_dtype)
    hidden, layers = decoder_states(
        config,
        embed_inputs(table, tokens, embeddings),
        single_blocks(config, params["layers"]),
        norm_with(config, params["final_norm"]),
        positions,
        mask=mask,
        extension=ContextExtension.of(config, positions, cache.ntk_alpha),
        caches=cache.layers,
    )
    return hidden, dataclasses.replace(cache, layers=layers)


def output_kernel(config: ModelConfig, params) -> jax.Array:
    """The output projection, [hidden, vocab_size] in the compute dtype."""
    # `apply` gives a pair only where collections are mutable.
    return cast(jax.Array, Qwen(config).apply({"params": _above_layers(params)}, method=Qwen.output_kernel))


def decoding_logits(config: ModelConfig, params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [batch, length, vocab_size] of hidden states [batch, length, hidden]."""
    return cast(jax.Array, Qwen(config).apply({"params": _above_layers(params)}, hidden, method=Qwen.logits))


def _above_layers(params) -> dict:
    return {name: leaf for name, leaf in params.items() if name != "layers"}
