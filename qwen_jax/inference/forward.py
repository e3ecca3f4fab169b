"""The forward pass as generation computes it, without a cache: context extension acts (report 2.3.2)."""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.models.transformer import Qwen


def logits(model: Qwen, params, tokens, lengths=None) -> jax.Array:
    """Inference-mode logits: `model.apply` with the dynamic NTK, LogN and windows that its configuration switches on.

    Compiles once for each shape of `tokens`. Computes any length; the extension is known to hold up to
    `ModelConfig.inference_length`.

    Args:
      model, params: as `load_pretrained` returns them.
      tokens: integers [batch, length]; an id outside the vocabulary gives NaN.
      lengths: integers [batch], the tokens of each row without its padding, which follows them; None: all. Dynamic NTK
        goes by them.

    Returns:
      float32 [batch, length, vocabulary]; logits at position t are for token t + 1.

    Raises:
      ValueError: `tokens` or `lengths` is of another shape or kind.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [batch, length] with at least one of each, found {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        if lengths.shape != tokens.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"lengths must be integers [{tokens.shape[0]}], one for each row of tokens, found {lengths.dtype} "
                f"{list(lengths.shape)}"
            )
    return _logits(model, params, tokens, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, lengths):
    hidden = model.apply({"params": params}, tokens, lengths, method=Qwen.inference_hidden_states)
    return model.apply({"params": params}, hidden, method=Qwen.logits)
