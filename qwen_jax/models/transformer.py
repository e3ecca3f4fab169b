"""The Qwen decoder of report 2.3.1: embedding, pre-norm blocks, final norm, output projection."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from qwen_jax.models.attention import SelfAttention
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import SAVED_NAMES, ModelConfig
from qwen_jax.models.kernels import causal_mask, resolve_kernel
from qwen_jax.models.layers import RMSNorm, SwiGLU, weight_init
from qwen_jax.models.log_probs import output_logits
from qwen_jax.models.ops import embed, gather_weight
from qwen_jax.models.positions import ContextExtension, dynamic_ntk_alpha, rotary_angles
from qwen_jax.sharding import constrain, platform


class Block(nn.Module):
    """One pre-norm decoder block: attention, then SwiGLU, each added to the residual stream."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, carry, layer, angles, segment_ids, mask, positions, extension):
        """Maps the scan's carry (residual stream [batch, length, hidden], cache or None) to the next block's."""
        x, cache = carry
        c = self.config
        normed = RMSNorm(c.norm_epsilon, c.compute_dtype, name="attention_norm")(x)
        attended, cache = SelfAttention(c, name="attention")(
            normed,
            angles,
            segment_ids,
            mask,
            deterministic=self.deterministic,
            layer=layer,
            cache=cache,
            positions=positions,
            extension=extension,
        )
        x = checkpoint_name(constrain(x + attended, "batch", "length", "activation_embed"), "residual")
        normed = RMSNorm(c.norm_epsilon, c.compute_dtype, name="mlp_norm")(x)
        x = constrain(x + SwiGLU(c, self.deterministic, name="mlp")(normed), "batch", "length", "activation_embed")
        return (x, cache), None


class InputEmbeddings(NamedTuple):
    """Vectors that take the place of token embeddings: features of an image, say.

    Attributes:
      values: [batch, length, hidden] in any floating-point dtype; gradients go to them.
      given: bool [batch, length], where they count. Elsewhere the token's own embedding stays.
    """

    values: jax.Array | np.ndarray
    given: jax.Array | np.ndarray


def embed_inputs(table: jax.Array, tokens: jax.Array, embeddings: InputEmbeddings | None = None) -> jax.Array:
    """The blocks' first input, [batch, length, hidden] in the dtype of `table` [vocabulary, hidden].

    An id outside the vocabulary gives NaN where no embedding takes its place.
    """
    x = embed(table, tokens)
    if embeddings is None:
        return x
    return jnp.where(embeddings.given[..., None], embeddings.values.astype(x.dtype), x)


def decoder_states(
    config: ModelConfig,
    x: jax.Array,
    layers: nn.Module | Iterable[Callable],
    final_norm: Callable,
    positions: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    extension: ContextExtension | None = None,
    caches: Iterable[KVCache] | None = None,
) -> tuple[jax.Array, tuple[KVCache | None, ...] | None]:
    """Embeddings through all blocks and the final norm: the one loop over layers, of training, decoding and checking.

    Args:
      x: [batch, length, hidden] in the compute dtype.
      layers: the scanned blocks, a module that takes all layers at once, so that compilation does not grow with depth;
        or single blocks, each `(carry, layer, *inputs) -> (carry, None)`, that are called one after the other. A
        generator may read the weights of each when its turn comes.
      final_norm: of the result of the last block.
      positions, segment_ids, mask, extension: see `SelfAttention`.
      caches: a KVCache for each of the single blocks, when decoding.

    Returns:
      (normed hidden states [batch, length, hidden], the caches of single blocks with the new positions; None for
      scanned blocks).
    """
    x = constrain(x, "batch", "length", "activation_embed")
    ntk_alpha = None if extension is None else extension.ntk_alpha
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, ntk_alpha)
    inputs = (angles, segment_ids, mask, positions, extension)
    if isinstance(layers, nn.Module):
        (x, _), _ = layers((x, None), jnp.arange(config.num_layers), *inputs)
        return final_norm(x), None
    written = []
    for index, (block, cache) in enumerate(zip(layers, caches or itertools.repeat(None), strict=caches is not None)):
        (x, cache), _ = block((x, cache), index, *inputs)
        written.append(cache)
    return final_norm(x), tuple(written)


def rematerialized(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """A block of a scan with `policy` of REMAT_POLICIES.

    Raises:
      ValueError: the platform has no other memory to offload to.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return block
    if policy == "dots":
        saved = policies.checkpoint_dots_with_no_batch_dims
    elif policy == "offload":
        if platform() == "cpu":
            raise ValueError("ModelConfig.remat = 'offload' needs TPUs or GPUs, which have a host: choose 'minimal'")
        saved = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(SAVED_NAMES["minimal"]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saved = policies.save_only_these_names(*SAVED_NAMES.get(policy, ()))
    # The scan already keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(block, policy=saved, prevent_cse=False)


class Qwen(nn.Module):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens)` gives float32 logits [batch, length, vocab_size]; logits at position t
    predict token t + 1. Parameters are float32; blocks are stacked along a leading `layers` axis.
    """

    config: ModelConfig

    @nn.nowrap
    def init_params(self, rng: jax.Array) -> dict:
        """Random float32 parameters, in boxes with the logical names of their axes."""
        return self.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass needs random numbers."""
        return self.config.has_dropout

    @nn.nowrap
    def attention(self, length: int | None, packed: bool, mesh: Mesh) -> str:
        """Name of the attention kernel for rows of `length` tokens on `mesh`.

        Raises:
          ValueError: the configured kernel cannot run there.
        """
        return resolve_kernel(self.config, length, mesh, packed=packed)

    def setup(self):
        c = self.config
        self.token_embedding = self.param(
            "token_embedding", weight_init(c.init_std, ("vocab", "embed")), (c.vocab_size, c.hidden_size)
        )
        self.final_norm = RMSNorm(c.norm_epsilon, c.compute_dtype)
        if c.head == "scalar":
            # As OpenAI's reward models start (arXiv 2009.01325): scores of about unit size, whatever the width.
            self.score = self.param(
                "score", weight_init((c.hidden_size + 1) ** -0.5, ("embed", None)), (c.hidden_size, 1)
            )
        elif not c.tie_embeddings:
            self.output = self.param(
                "output", weight_init(c.init_std, ("embed", "vocab")), (c.hidden_size, c.vocab_size)
            )

    @nn.compact
    def _hidden(self, tokens, embeddings, positions, segment_ids, mask, deterministic, extension=None):
        c = self.config
        x = embed_inputs(gather_weight(self.token_embedding, ("vocab", "embed"), c.compute_dtype), tokens, embeddings)
        x = nn.Dropout(c.embedding_dropout)(x, deterministic=deterministic or c.embedding_dropout == 0)
        block = Block if self.is_initializing() else rematerialized(Block, c.remat)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, deterministic, name="layers")
        hidden, _ = decoder_states(
            c, x, blocks, self.final_norm, positions, segment_ids=segment_ids, mask=mask, extension=extension
        )
        return hidden

    def output_kernel(self) -> jax.Array:
        """The output projection, [hidden, vocab_size] in the compute dtype.

        Raises:
          ValueError: the model has a scalar head.
        """
        if self.config.head != "tokens":
            raise ValueError("a model with ModelConfig.head = 'scalar' has no output projection: it gives no logits")
        dtype = self.config.compute_dtype
        if self.config.tie_embeddings:
            return gather_weight(self.token_embedding, ("vocab", "embed"), dtype).T
        return gather_weight(self.output, ("embed", "vocab"), dtype)

    def scalars(self, tokens, **arguments) -> jax.Array:
        """The scalar head's number at each position, float32 [batch, length]; arguments as in `__call__`.

        The number at position t depends on tokens 0 to t of its segment.

        Raises:
          ValueError: the model has no scalar head.
        """
        if self.config.head != "scalar":
            raise ValueError("a model with ModelConfig.head = 'tokens' has no scalar head: set it to 'scalar'")
        return self(tokens, **arguments)[..., 0]

    def hidden_states(
        self, tokens, *, embeddings: InputEmbeddings | None = None, positions=None, segment_ids=None, deterministic=True
    ) -> jax.Array:
        """Normed final hidden states [batch, length, hidden] in the compute dtype; arguments as in `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # Parameters are made with a sequence of one token, which not every kernel takes.
        mask = causal_mask(tokens.shape[1], segment_ids) if self.is_initializing() else None
        return self._hidden(tokens, embeddings, positions, segment_ids, mask, deterministic)

    def __call__(
        self, tokens, *, embeddings: InputEmbeddings | None = None, positions=None, segment_ids=None, deterministic=True
    ) -> jax.Array:
        """The training-mode forward pass.

        Args:
          tokens: int32 [batch, length]; an id outside the vocabulary gives NaN.
          embeddings: vectors in the place of some of the tokens' embeddings.
          positions: int32 [batch, length], 0-based; by default 0, 1, 2, …
          segment_ids: int32 [batch, length]; tokens attend only within their segment. None: one segment.
          deterministic: False applies dropout and needs an rng named "dropout".

        Returns:
          float32 [batch, length, vocab_size]; [batch, length, 1] with a scalar head.
        """
        hidden = self.hidden_states(
            tokens,
            embeddings=embeddings,
            positions=positions,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        return self.logits(hidden)

    def inference_hidden_states(self, tokens, lengths=None, *, embeddings: InputEmbeddings | None = None) -> jax.Array:
        """The inference-mode forward pass: context extension (report 2.3.2) acts as `config` says.

        Args:
          tokens: int32 [batch, length].
          lengths: int32 [batch], the tokens of each row without its padding, which follows them; None: all.
          embeddings: vectors in the place of some of the tokens' embeddings.

        Returns:
          Normed final hidden states [batch, length, hidden]; `logits` makes logits of them.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1]) if lengths is None else lengths
        alpha = dynamic_ntk_alpha(lengths, self.config.context_length)
        extension = ContextExtension.of(self.config, positions, alpha)
        mask = causal_mask(tokens.shape[1], None)
        return self._hidden(tokens, embeddings, positions, None, mask, True, extension)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [batch, length, vocab_size] of hidden states [batch, length, hidden]; see `__call__`."""
        if self.config.head == "scalar":
            return output_logits(hidden.astype(jnp.float32), self.score)
        return constrain(output_logits(hidden, self.output_kernel()), "batch", "length", "vocab")


def abstract_params(model: Qwen):
    """Shapes and logical axis names of the parameters: a pytree of boxed ShapeDtypeStructs. Allocates nothing."""
    # A copy, which the caller may change.
    return jax.tree.map(lambda leaf: leaf, _abstract_params(model))  # ty: ignore[invalid-argument-type]


@functools.lru_cache(maxsize=8)
def _abstract_params(model: Qwen):
    return jax.eval_shape(lambda: model.init_params(jax.random.key(0)))
