"""What runs on the devices: prompts into a cache, a cache into its rows of the batch, and many tokens at a time.

The host chooses between these programs and looks at the result of each; nothing here waits for it.
"""

import inspect
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.inference.sampling import RowSampling, next_tokens
from qwen_jax.models.attention import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.decoding import DecodingCache, decode, decoding_logits, unstack_layers
from qwen_jax.models.transformer import Qwen, abstract_params
from qwen_jax.sharding import constrain, use_mesh

# Tokens of a prompt that are computed at once: attention over all of a long one would be its length squared.
PREFILL_CHUNK = 1024
# Tokens of a row that can be generated before the host looks.
MAX_STEPS = 32


@flax.struct.dataclass
class BatchState:
    """What the devices keep of a batch between two programs.

    cache: of the tokens so far, but for the last of each row.
    token: int32 [rows], the last token of each row.
    position: int32 [rows], its position.
    seen: bool [rows, vocabulary], which tokens a row has.
    """

    cache: DecodingCache
    token: jax.Array
    position: jax.Array
    seen: jax.Array

    def placed(self) -> "BatchState":
        """Itself, rows lying where the mesh in use has them."""
        return self.replace(
            cache=self.cache.replace(ntk_alpha=constrain(self.cache.ntk_alpha, "batch")),
            token=constrain(self.token, "batch"),
            position=constrain(self.position, "batch"),
            seen=constrain(self.seen, "batch", None),
        )


@flax.struct.dataclass
class RowRules:
    """What the host tells a program about each row.

    sampling: `RowSampling` of the rows.
    stop_ids: int32 [rows, width], filled up with -1.
    end: int32 [rows], how many tokens prompt and continuation may have.
    """

    sampling: RowSampling
    stop_ids: jax.Array
    end: jax.Array


def _on_mesh(static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable:
    """`jax.jit` of a function that is called with a further argument: the mesh (or None) that it is traced on."""

    def decorate(function):
        def traced(mesh, *arguments):
            with use_mesh(mesh):
                return function(*arguments)

        names = ["mesh", *inspect.signature(function).parameters]
        compiled = jax.jit(
            traced,
            static_argnums=tuple(names.index(name) for name in ("mesh", *static)),
            donate_argnums=tuple(names.index(name) for name in donated),
        )
        compiled.__doc__ = function.__doc__
        return compiled

    return decorate


@_on_mesh(static=("config",))
def prepare(config: ModelConfig, params):
    """Parameters of `Qwen` as `unstack_layers` gives them, in the compute dtype, lying as in training."""
    boxed = abstract_params(Qwen(config))
    names = {
        **boxed,
        "layers": tuple(
            jax.tree.map(lambda box: box.replace(names=box.names[1:]), boxed["layers"], is_leaf=_is_box)
            for _ in range(config.num_layers)
        ),
    }
    apart = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params), config.num_layers)
    return jax.tree.map(lambda box, leaf: constrain(leaf, *box.names), names, apart, is_leaf=_is_box)


def _is_box(node) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


@_on_mesh(static=("config", "rows", "slots"))
def empty_state(config: ModelConfig, rows: int, slots: int) -> BatchState:
    """A batch without requests."""
    cache = DecodingCache.empty(config, rows, slots, jnp.ones(rows, jnp.int32))
    zeros = jnp.zeros(rows, jnp.int32)
    return BatchState(cache, zeros, zeros, jnp.zeros((rows, config.vocab_size), bool)).placed()


@_on_mesh(static=("config",))
def prefill(config: ModelConfig, params, tokens: jax.Array, lengths: jax.Array) -> tuple:
    """Computes prompts.

    Padding writes into slots after the prompt; each is overwritten before a position can see it.

    Args:
      params: as `unstack_layers` gives them.
      tokens: int32 [rows, bucket], prompts filled up at the end; above `PREFILL_CHUNK`, bucket is a multiple of it.
      lengths: int32 [rows], of the prompts.

    Returns:
      (cache of `bucket` slots, float32 logits [rows, vocabulary] for the token after each prompt, bool of that shape:
      which tokens the prompt has).
    """
    rows, bucket = tokens.shape
    chunk = min(bucket, PREFILL_CHUNK)

    def step(carry, start):
        cache, last = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        hidden, cache = decode(config, params, part, jnp.full(rows, start), cache)
        at = lengths - 1 - start
        here = jnp.take_along_axis(hidden, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)
        return (cache, jnp.where(((at >= 0) & (at < chunk))[:, None, None], here, last)), None

    cache = DecodingCache.empty(config, rows, bucket, lengths)
    carry = (cache, jnp.zeros((rows, 1, config.hidden_size), config.compute_dtype))
    if chunk == bucket:
        carry, _ = step(carry, 0)
    else:
        carry, _ = jax.lax.scan(step, carry, jnp.arange(0, bucket, chunk))
    cache, last = carry
    prompt = jnp.where(jnp.arange(bucket) < lengths[:, None], tokens, config.vocab_size)
    seen = jnp.zeros((rows, config.vocab_size), bool).at[jnp.arange(rows)[:, None], prompt].set(True, mode="drop")
    return cache, decoding_logits(config, params, last)[:, 0], constrain(seen, "batch", None)


@_on_mesh(static=("greedy",), donated=("seen",))
def first_tokens(logits: jax.Array, seen: jax.Array, lengths: jax.Array, sampling: RowSampling, greedy: bool):
    """The token after each prompt.

    Args:
      logits, seen: from `prefill`; `lengths` as there.
      greedy: whether no row draws.

    Returns:
      (token int32 [rows], log-probability float32 [rows], `seen` with these tokens).
    """
    token, log_probs = next_tokens(logits, seen, sampling, lengths, greedy)
    return token, log_probs, seen.at[jnp.arange(len(token)), token].set(True)


@_on_mesh(donated=("state",))
def insert(
    state: BatchState, cache: DecodingCache, token: jax.Array, lengths: jax.Array, seen: jax.Array, rows: jax.Array
) -> BatchState:
    """The batch with new requests in its rows `rows`: their cache, of fewer slots, and what `first_tokens` gave.

    A row may be named twice, with the same content.
    """

    def put(whole, part):
        written = whole.at[rows, :, : part.shape[2]].set(part)
        return constrain(written, "batch", "kv_heads", None, None)

    layers = tuple(
        KVCache(put(old.key, new.key), put(old.value, new.value))
        for old, new in zip(state.cache.layers, cache.layers, strict=True)
    )
    return BatchState(
        DecodingCache(layers, state.cache.ntk_alpha.at[rows].set(cache.ntk_alpha)),
        state.token.at[rows].set(token),
        state.position.at[rows].set(lengths),
        state.seen.at[rows].set(seen),
    ).placed()


@_on_mesh(static=("slots",))
def grow(state: BatchState, slots: int) -> BatchState:
    """The batch with a cache of `slots` positions a row, more than it has."""

    def widen(array):
        wider = jnp.pad(array, ((0, 0), (0, 0), (0, slots - array.shape[2]), (0, 0)))
        return constrain(wider, "batch", "kv_heads", None, None)

    layers = tuple(KVCache(widen(layer.key), widen(layer.value)) for layer in state.cache.layers)
    return state.replace(cache=state.cache.replace(layers=layers)).placed()


@_on_mesh(static=("config", "greedy"), donated=("state",))
def generate(
    config: ModelConfig,
    params,
    state: BatchState,
    active: jax.Array,
    rules: RowRules,
    steps: jax.Array,
    floor: jax.Array,
    greedy: bool,
):
    """Up to `steps` (at most `MAX_STEPS`) tokens for each active row.

    A row that finishes stays as it is. It ends early when no more than `floor` rows are active.

    Args:
      active: bool [rows]; the others are computed along, and nobody looks at them.
      greedy: whether no row draws.

    Returns:
      (state, tokens int32 [rows, MAX_STEPS], log-probabilities float32 [rows, MAX_STEPS], how many of them each row
      has [rows]).
    """
    rows = active.shape[0]
    index = jnp.arange(rows)

    def finished(token, position):
        return jnp.any(rules.stop_ids == token[:, None], axis=-1) | (position + 1 >= rules.end)

    def going_on(carry):
        done, _, active, *_ = carry
        return (done < steps) & (jnp.sum(active) > floor)

    def step(carry):
        done, state, active, tokens, log_probs, counts = carry
        hidden, cache = decode(config, params, state.token[:, None], state.position, state.cache)
        logits = decoding_logits(config, params, hidden)[:, 0]
        token, log_prob = next_tokens(logits, state.seen, rules.sampling, state.position + 1, greedy)
        token = jnp.where(active, token, state.token)
        position = state.position + active
        new = BatchState(cache, token, position, state.seen.at[index, token].set(True)).placed()
        counts = counts + active
        return (
            done + 1,
            new,
            active & ~finished(token, position),
            tokens.at[:, done].set(token),
            log_probs.at[:, done].set(log_prob),
            counts,
        )

    empty = (jnp.zeros((rows, MAX_STEPS), jnp.int32), jnp.zeros((rows, MAX_STEPS), jnp.float32))
    carry = (jnp.int32(0), state, active, *empty, jnp.zeros(rows, jnp.int32))
    _, state, _, tokens, log_probs, counts = jax.lax.while_loop(going_on, step, carry)
    return state, tokens, log_probs, counts
