"""The Qwen decoder of report 2.3.1: embedding, scanned pre-norm blocks, final norm, output projection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.models.attention import SelfAttention
from qwen_jax.models.config import SAVED_NAMES, ModelConfig
from qwen_jax.models.kernels import causal_mask
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
        x = constrain(x + SwiGLU(c, name="mlp")(normed), "batch", "length", "activation_embed")
        return (x, cache), None


def _rematerialised(block: type[Block], policy: str) -> type[Block]:
    """The block with `policy` of REMAT_POLICIES.

    Raises:
      ValueError: there is no other memory to offload to.
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

    def setup(self):
        c = self.config
        self.token_embedding = self.param(
            "token_embedding", weight_init(c.init_std, ("vocab", "embed")), (c.vocab_size, c.hidden_size)
        )
        self.final_norm = RMSNorm(c.norm_epsilon, c.compute_dtype)
        if not c.tie_embeddings:
            self.output = self.param(
                "output", weight_init(c.init_std, ("embed", "vocab")), (c.hidden_size, c.vocab_size)
            )

    @nn.compact
    def _hidden(self, tokens, positions, segment_ids, mask, deterministic, extension=None):
        c = self.config
        x = embed(gather_weight(self.token_embedding, ("vocab", "embed"), c.compute_dtype), tokens)
        x = nn.Dropout(c.embedding_dropout)(x, deterministic=deterministic or c.embedding_dropout == 0)
        x = constrain(x, "batch", "length", "activation_embed")
        ntk_alpha = None if extension is None else extension.ntk_alpha
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, ntk_alpha)
        block = Block if self.is_initializing() else _rematerialised(Block, c.remat)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, deterministic, name="layers")
        (x, _), _ = blocks((x, None), jnp.arange(c.num_layers), angles, segment_ids, mask, positions, extension)
        return self.final_norm(x)

    def output_kernel(self) -> jax.Array:
        """The output projection, [hidden, vocab_size] in the compute dtype."""
        dtype = self.config.compute_dtype
        if self.config.tie_embeddings:
            return gather_weight(self.token_embedding, ("vocab", "embed"), dtype).T
        return gather_weight(self.output, ("embed", "vocab"), dtype)

    def hidden_states(self, tokens, *, positions=None, segment_ids=None, deterministic=True) -> jax.Array:
        """Normed final hidden states [batch, length, hidden] in the compute dtype; arguments as in `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # Parameters are made with a sequence of one token, whatever kernel trains them.
        mask = causal_mask(tokens.shape[1], segment_ids) if self.is_initializing() else None
        return self._hidden(tokens, positions, segment_ids, mask, deterministic)

    def __call__(self, tokens, *, positions=None, segment_ids=None, deterministic=True) -> jax.Array:
        """The training-mode forward pass.

        Args:
          tokens: int32 [batch, length]; an id outside the vocabulary gives NaN.
          positions: int32 [batch, length], 0-based; by default 0, 1, 2, …
          segment_ids: int32 [batch, length]; tokens attend only within their segment. None: one segment.
          deterministic: False applies dropout and needs an rng named "dropout".

        Returns:
          float32 [batch, length, vocab_size].
        """
        hidden = self.hidden_states(tokens, positions=positions, segment_ids=segment_ids, deterministic=deterministic)
        return self.logits(hidden)

    def inference_hidden_states(self, tokens, lengths=None) -> jax.Array:
        """The inference-mode forward pass: context extension (report 2.3.2) acts as `config` says.

        Args:
          tokens: int32 [batch, length].
          lengths: int32 [batch], how many tokens of each row are no padding, which comes after them; None: all.

        Returns:
          Normed final hidden states [batch, length, hidden]; `logits` makes logits of them.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1]) if lengths is None else lengths
        alpha = dynamic_ntk_alpha(lengths, self.config.context_length)
        extension = ContextExtension.of(self.config, positions, alpha)
        mask = causal_mask(tokens.shape[1], None)
        return self._hidden(tokens, positions, None, mask, True, extension)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [batch, length, vocab_size] of hidden states [batch, length, hidden]."""
        return constrain(output_logits(hidden, self.output_kernel()), "batch", "length", "vocab")


def abstract_params(model: Qwen):
    """Shapes and logical axis names of the parameters, nothing allocated: a pytree of boxed ShapeDtypeStructs."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(abstract_params(Qwen(config)))))
