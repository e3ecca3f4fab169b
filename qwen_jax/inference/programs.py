"""Programs for the devices: prompts into a cache, a cache into its rows of the batch, and many tokens at a time.

The host chooses between these programs and reads their results. Results lie whole on every device, so that every
process of a job can read them.
"""

import dataclasses
import inspect
import logging
import math
import time
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax.inference.sampling import MOST_LIKELY, RowSampling, log_prob_of, most_likely, next_tokens
from qwen_jax.models.cache import KVCache, cache_dtype
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.decoding import (
    DecodingCache,
    decode,
    decode_branches,
    decoding_logits,
    output_kernel,
    unstack_layers,
)
from qwen_jax.models.log_probs import token_statistics
from qwen_jax.models.positions import dynamic_ntk_alpha
from qwen_jax.models.transformer import InputEmbeddings
from qwen_jax.models.vision.encoder import VisionEncoder
from qwen_jax.sharding import constrain, use_mesh

log = logging.getLogger(__name__)

# Tokens of a row that can be generated before the host looks.
MAX_STEPS = 32
# Places of a row whose logits are computed at once where the most probable tokens are wanted.
READS_AT_A_TIME = 64
# Tokens of a block of the prefix cache.
BLOCK_TOKENS = 16


@flax.struct.dataclass
class BatchState:
    """State of a batch on the devices between two programs.

    cache: of the tokens so far, except the last of each row.
    token: int32 [rows], the last token of each row.
    position: int32 [rows], its position.
    seen: bool [rows, vocabulary], which tokens a row has.
    counts: int32 [rows, vocabulary], how often a row has generated each token; None: no row goes by it.
    """

    cache: DecodingCache
    token: jax.Array
    position: jax.Array
    seen: jax.Array
    counts: jax.Array | None = None

    def placed(self) -> "BatchState":
        """The same state with its rows split over the mesh in use."""
        return dataclasses.replace(
            self,
            cache=dataclasses.replace(self.cache, ntk_alpha=constrain(self.cache.ntk_alpha, "batch")),
            token=constrain(self.token, "batch"),
            position=constrain(self.position, "batch"),
            seen=constrain(self.seen, "batch", None),
            counts=None if self.counts is None else constrain(self.counts, "batch", None),
        )


@flax.struct.dataclass
class RowRules:
    """How each row goes on, and where it ends.

    sampling: `RowSampling` of the rows.
    stop_ids: int32 [rows, width], filled up with -1.
    end: int32 [rows], how many tokens prompt and continuation may have.
    """

    sampling: RowSampling
    stop_ids: jax.Array | np.ndarray
    end: jax.Array | np.ndarray


class Programs:
    """Runs the programs below on a mesh, and logs each one that is compiled.

    Attributes:
      mesh: the devices; None: the first one of this process.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self._compiled: set[tuple] = set()

    @property
    def compilations(self) -> int:
        """Number of programs that have been compiled."""
        return len(self._compiled)

    def __call__(self, program: Callable, key: tuple, *arguments) -> Any:
        """The result of `program`. `key` has all sizes that the shapes of `arguments` depend on."""
        begun = time.perf_counter()
        result = program(self.mesh, *arguments)
        if key not in self._compiled:
            self._compiled.add(key)
            log.info(
                "compiled %s in %.1f s; %d programs so far",
                " ".join(str(part) for part in key),
                time.perf_counter() - begun,
                len(self._compiled),
            )
        return result


def on_mesh(static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable:
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


@on_mesh(static=("config", "names"))
def prepare(config: ModelConfig, names, params):
    """Parameters in the compute dtype, each block's as arrays of their own.

    Args:
      names: logical axis names of each result, by its path in the unstacked tree (a tuple of pairs, to be hashable).
      params: some of the top-level parameters of `Qwen`; `layers` stacked, or a tuple of blocks.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params)
    if not isinstance(params.get("layers", ()), tuple):
        params = unstack_layers(params, config.num_layers)
    axes = dict(names)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(leaf, *axes[jax.tree_util.keystr(path)]), params
    )


@on_mesh(static=("config",))
def encode_images(config: ModelConfig, params, images: jax.Array) -> jax.Array:
    """Features [pictures, num_queries, hidden] of pictures [pictures, image_size, image_size, 3]; see `VisionEncoder`.

    Args:
      params: of the encoder.
    """
    assert config.vision is not None  # see `images.checked_images`
    images = constrain(images, "batch", None, None, None)
    features = VisionEncoder(config, config.vision).apply({"params": params}, images)
    return constrain(cast(jax.Array, features), None, None, None)


@on_mesh(static=("config", "rows", "slots"))
def empty_state(config: ModelConfig, rows: int, slots: int) -> BatchState:
    """A batch without requests."""
    cache = DecodingCache.empty(config, rows, slots, jnp.ones(rows, jnp.int32))
    zeros = jnp.zeros(rows, jnp.int32)
    return BatchState(cache, zeros, zeros, jnp.zeros((rows, config.vocab_size), bool)).placed()


@flax.struct.dataclass
class CachedPrefixes:
    """The beginnings of prompts, whose keys and values a pool has in blocks of `BLOCK_TOKENS`.

    pool: a KVCache for each layer, [blocks, kv_heads, BLOCK_TOKENS, head_dim].
    blocks: int32 [rows, slots / BLOCK_TOKENS], the block of the pool in each place of a row; past the pool's end for
      none.
    lengths: int32 [rows], tokens of each prefix.
    prompts: int32 [rows, slots], the whole prompts, filled up at the end.
    """

    pool: tuple[KVCache, ...]
    blocks: jax.Array | np.ndarray
    lengths: jax.Array | np.ndarray
    prompts: jax.Array | np.ndarray

    def cache(self, config: ModelConfig, prompt_lengths: jax.Array) -> DecodingCache:
        """A cache of `slots` positions for each row that begins with its prefix.

        Args:
          prompt_lengths: int32 [rows], of the whole prompts.
        """
        rows, slots = self.prompts.shape

        def gather(pool):
            found = pool.at[self.blocks].get(mode="fill", fill_value=0)
            found = found.swapaxes(1, 2).reshape(rows, config.num_kv_heads, slots, config.head_dim)
            return constrain(found, "batch", "kv_heads", None, None)

        layers = tuple(KVCache(gather(layer.key), gather(layer.value)) for layer in self.pool)
        alpha = jnp.ones(rows, jnp.float32)
        if config.use_dynamic_ntk:
            alpha = dynamic_ntk_alpha(prompt_lengths, config.context_length)
        return DecodingCache(layers, alpha)


@on_mesh(static=("config",))
def prefill(
    config: ModelConfig,
    params,
    tokens: jax.Array,
    lengths: jax.Array,
    embeddings: InputEmbeddings | None = None,
    prefixes: CachedPrefixes | None = None,
) -> tuple:
    """Computes whole prompts, or what follows their prefixes.

    Padding writes into slots after the row's tokens; each is overwritten before a position can see it.

    Args:
      params: as `unstack_layers` gives them.
      tokens: int32 [rows, bucket], prompts (without their prefixes) filled up at the end. An id outside the vocabulary
        stands for none.
      lengths: int32 [rows], of the whole prompts.
      embeddings: vectors in the place of some of the tokens' embeddings, or None.
      prefixes: of the prompts, or None. A prefix and `bucket` together are within their slots.

    Returns:
      (cache of the slots of `prefixes`, or of `bucket` slots; float32 logits [rows, vocabulary] for the token after
      each prompt; bool of that shape: whether the prompt has the token).
    """
    rows, bucket = tokens.shape
    if prefixes is None:
        prompts, starts = tokens, jnp.zeros(rows, jnp.int32)
        cache = DecodingCache.empty(config, rows, bucket, lengths)
    else:
        prompts, starts = jnp.asarray(prefixes.prompts), jnp.asarray(prefixes.lengths)
        cache = prefixes.cache(config, lengths)
    hidden, cache = decode(config, params, tokens, starts, cache, embeddings)
    last = jnp.take_along_axis(hidden, (lengths - 1 - starts)[:, None, None], axis=1)
    prompts = jnp.where(jnp.arange(prompts.shape[1]) < lengths[:, None], prompts, config.vocab_size)
    seen = jnp.zeros((rows, config.vocab_size), bool).at[jnp.arange(rows)[:, None], prompts].set(True, mode="drop")
    return cache, decoding_logits(config, params, last)[:, 0], constrain(seen, "batch", None)


@on_mesh(static=("config", "blocks"))
def empty_pool(config: ModelConfig, blocks: int) -> tuple[KVCache, ...]:
    """A pool of `blocks` blocks of `BLOCK_TOKENS` tokens for each layer, whole on every part of the batch's axes."""
    shape = (blocks, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)

    def zeros():
        return constrain(jnp.zeros(shape, cache_dtype(config)), None, "kv_heads", None, None)

    return tuple(KVCache(zeros(), zeros()) for _ in range(config.num_layers))


@on_mesh(donated=("pool",))
def keep(pool, layers: tuple[KVCache, ...], rows: jax.Array, blocks: jax.Array, places: jax.Array):
    """The pool with n blocks from the rows of a batch.

    Args:
      layers: keys and values of the batch; slots are a multiple of `BLOCK_TOKENS`.
      rows, blocks: int32 [n], of which row, and which block of it.
      places: int32 [n], where they go in the pool; all different, or past its end, where they are dropped.
    """

    def put(whole, cache):
        slots = blocks[:, None] * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS)
        # The index of rows and slots comes first: [n, BLOCK_TOKENS, kv_heads, head_dim].
        found = cache[rows[:, None], :, slots].swapaxes(1, 2)
        return constrain(whole.at[places].set(found, mode="drop"), None, "kv_heads", None, None)

    return tuple(KVCache(put(p.key, c.key), put(p.value, c.value)) for p, c in zip(pool, layers, strict=True))


@flax.struct.dataclass
class ScoringStep:
    """Tokens that are scored at once: texts side by side, as `decode_branches` takes them.

    tokens, positions, ends: int32 [rows, length], as there.
    text_length: int32 [rows], number of tokens of any of the texts, which dynamic NTK goes by: the same for all.
    at: int32 [rows, reads], the places in the row after which the model is asked for the next token.
    targets: int32 [rows, reads], the tokens that it is asked for.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    ends: jax.Array | np.ndarray
    text_length: jax.Array | np.ndarray
    at: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray


@on_mesh(static=("config", "rows", "slots"))
def empty_cache(config: ModelConfig, rows: int, slots: int) -> tuple[KVCache, ...]:
    """A cache of no tokens for each block."""
    return tuple(KVCache.empty(config, rows, slots) for _ in range(config.num_layers))


@on_mesh(static=("config", "top"), donated=("cache",))
def score(
    config: ModelConfig,
    params,
    cache: tuple[KVCache, ...],
    step: ScoringStep,
    embeddings: InputEmbeddings | None = None,
    top: bool = False,
) -> tuple:
    """Log-probabilities of given tokens after texts that go on from what the cache holds.

    Args:
      params: as `unstack_layers` gives them.
      cache: of the tokens before those of `step`, with slots for them.
      embeddings: vectors in the place of some of the tokens' embeddings, or None.
      top: whether the most probable tokens are wanted, too.

    Returns:
      (log-probabilities, whether each target is the most likely token, both float32 [rows, reads]; None or what
      `most_likely` gives for each read, [rows, reads, MOST_LIKELY]; the cache with the tokens of `step`).
    """
    tokens, positions, ends, lengths = map(jnp.asarray, (step.tokens, step.positions, step.ends, step.text_length))
    alpha = jnp.ones(len(tokens), jnp.float32)
    if config.use_dynamic_ntk:
        alpha = dynamic_ntk_alpha(lengths, config.context_length)
    hidden, written = decode_branches(config, params, tokens, positions, ends, DecodingCache(cache, alpha), embeddings)
    hidden = jnp.take_along_axis(hidden, jnp.asarray(step.at)[..., None], axis=1)
    targets = jnp.asarray(step.targets)
    if top:
        return *_ranked_reads(config, params, hidden, targets), written.layers
    found = token_statistics(hidden, output_kernel(config, params), targets)
    return constrain(found.log_probs, None, None), constrain(found.most_likely, None, None), None, written.layers


def _ranked_reads(config: ModelConfig, params, hidden: jax.Array, targets: jax.Array) -> tuple:
    """The first three results of `score` with `top`, for hidden states [rows, reads, hidden].

    All come from the same logits, so that the log-probability of a target among the most likely tokens is equal to the
    last bit in both places.
    """
    rows, reads, _ = hidden.shape
    chunk = math.gcd(reads, READS_AT_A_TIME)

    def some(start):
        part = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1)
        wanted = jax.lax.dynamic_slice_in_dim(targets, start, chunk, axis=1).reshape(-1)
        logits = decoding_logits(config, params, part).reshape(rows * chunk, -1)
        ids, values = most_likely(logits)
        log_probs = log_prob_of(logits, wanted)
        found = log_probs, (log_probs >= values[:, 0]).astype(jnp.float32), ids, values
        return [one.reshape(rows, chunk, *one.shape[1:]) for one in found]

    found = jax.lax.map(some, jnp.arange(0, reads, chunk))
    log_probs, first, ids, values = [jnp.moveaxis(one, 0, 1).reshape(rows, reads, *one.shape[3:]) for one in found]
    ranked = constrain(ids, None, None, None), constrain(values, None, None, None)
    return constrain(log_probs, None, None), constrain(first, None, None), ranked


def _most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids, log_probs = most_likely(logits)
    return constrain(ids, None, None), constrain(log_probs, None, None)


@on_mesh(static=("greedy", "top"))
def first_tokens(
    logits: jax.Array,
    seen: jax.Array,
    lengths: jax.Array,
    sampling: RowSampling,
    greedy: bool,
    top: bool,
    prompts: jax.Array | None = None,
):
    """The token after each prompt, perhaps several draws of it.

    Args:
      logits, seen: from `prefill`.
      lengths: int32 [rows], of the prompts.
      greedy: whether no row draws.
      top: whether a row is asked for the most probable tokens.
      prompts: int32 [rows], which prompt each row continues; None: each its own.

    Returns:
      (token int32 [rows], log-probabilities float32 [rows, 2], what `most_likely` gives or None, `seen` with these
      tokens). The two log-probabilities are those of `next_tokens`.
    """
    if prompts is not None:
        logits, seen = (constrain(x[prompts], "batch", None) for x in (logits, seen))
    token, *log_probs = next_tokens(logits, seen, sampling, lengths, greedy)
    seen = seen.at[jnp.arange(len(token)), token].set(True)
    ranked = _most_likely(logits) if top else None
    return constrain(token, None), constrain(jnp.stack(log_probs, axis=-1), None, None), ranked, seen


@on_mesh(donated=("state",))
def begin_counts(state: BatchState) -> BatchState:
    """The batch with counts of 0: right for rows that do not go by them, and for those that are inserted next."""
    return dataclasses.replace(state, counts=jnp.zeros(state.seen.shape, jnp.int32)).placed()


@on_mesh(donated=("state",))
def insert(
    state: BatchState,
    cache: DecodingCache,
    token: jax.Array,
    lengths: jax.Array,
    seen: jax.Array,
    rows: jax.Array,
    prompts: jax.Array | None = None,
) -> BatchState:
    """The batch with new requests in its rows `rows`: their cache, of fewer slots, and what `first_tokens` gave.

    A row may be named twice, with the same content.

    Args:
      cache: of the prompts; `prompts` as in `first_tokens`.
    """
    if prompts is not None:
        cache = jax.tree.map(lambda x: x[prompts], cache)

    def put(whole, part):
        written = whole.at[rows, :, : part.shape[2]].set(part)
        return constrain(written, "batch", "kv_heads", None, None)

    layers = tuple(
        KVCache(put(old.key, new.key), put(old.value, new.value))
        for old, new in zip(state.cache.layers, cache.layers, strict=True)
    )
    counts = state.counts
    return BatchState(
        DecodingCache(layers, state.cache.ntk_alpha.at[rows].set(cache.ntk_alpha)),
        state.token.at[rows].set(token),
        state.position.at[rows].set(lengths),
        state.seen.at[rows].set(seen),
        None if counts is None else counts.at[rows].set(0).at[rows, token].set(1),
    ).placed()


@on_mesh(static=("rows", "slots"))
def grow(state: BatchState, rows: int, slots: int) -> BatchState:
    """The batch with at least as many rows, and as many slots in each, as before; new rows are without requests."""

    def widen(array, fill=0):
        new = [(0, rows - array.shape[0]), *[(0, 0)] * (array.ndim - 1)]
        if array.ndim == 4:
            new[2] = (0, slots - array.shape[2])
        return jnp.pad(array, new, constant_values=fill)

    layers = tuple(
        KVCache(*(constrain(widen(x), "batch", "kv_heads", None, None) for x in (layer.key, layer.value)))
        for layer in state.cache.layers
    )
    return BatchState(
        DecodingCache(layers, widen(state.cache.ntk_alpha, 1)),
        widen(state.token),
        widen(state.position),
        widen(state.seen, False),
        None if state.counts is None else widen(state.counts),
    ).placed()


@on_mesh(static=("config", "greedy", "top"), donated=("state",))
def generate(
    config: ModelConfig,
    params,
    state: BatchState,
    active: jax.Array,
    rules: RowRules,
    steps: jax.Array,
    floor: jax.Array,
    greedy: bool,
    top: bool,
):
    """Up to `steps` (at most `MAX_STEPS`) tokens for each active row.

    A row that finishes stays as it is. It ends early when no more than `floor` rows are active.

    Args:
      active: bool [rows]; the other rows are computed, too, and their results are ignored.
      greedy: whether no row draws.
      top: whether a row is asked for the most probable tokens.

    Returns:
      (state, tokens int32 [rows, MAX_STEPS], log-probabilities float32 [rows, MAX_STEPS, 2] as in `first_tokens`,
      ids and log-probabilities [rows, MAX_STEPS, n] of `most_likely` or None, how many of them each row has [rows]).
    """
    rows = active.shape[0]
    index = jnp.arange(rows)

    def finished(token, position):
        return jnp.any(rules.stop_ids == token[:, None], axis=-1) | (position + 1 >= rules.end)

    def going_on(carry):
        done, _, active, *_ = carry
        return (done < steps) & (jnp.sum(active) > floor)

    def step(carry):
        done, state, active, tokens, log_probs, ranked, counts = carry
        hidden, cache = decode(config, params, state.token[:, None], state.position, state.cache)
        logits = decoding_logits(config, params, hidden)[:, 0]
        token, *log_prob = next_tokens(logits, state.seen, rules.sampling, state.position + 1, greedy, state.counts)
        token = jnp.where(active, token, state.token)
        position = state.position + active
        seen = state.seen.at[index, token].set(True)
        come = None if state.counts is None else state.counts.at[index, token].add(1)
        new = BatchState(cache, token, position, seen, come).placed()
        if top:
            ranked = jax.tree.map(lambda whole, part: whole.at[:, done].set(part), ranked, most_likely(logits))
        counts = counts + active
        return (
            done + 1,
            new,
            active & ~finished(token, position),
            tokens.at[:, done].set(token),
            log_probs.at[:, done].set(jnp.stack(log_prob, axis=-1)),
            ranked,
            counts,
        )

    empty = (jnp.zeros((rows, MAX_STEPS), jnp.int32), jnp.zeros((rows, MAX_STEPS, 2), jnp.float32))
    ranked = None
    if top:
        shape = (rows, MAX_STEPS, min(MOST_LIKELY, config.vocab_size))
        ranked = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    carry = (jnp.int32(0), state, active, *empty, ranked, jnp.zeros(rows, jnp.int32))
    _, state, _, tokens, log_probs, ranked, counts = jax.lax.while_loop(going_on, step, carry)
    ranked = jax.tree.map(lambda x: constrain(x, None, None, None), ranked)
    return state, constrain(tokens, None, None), constrain(log_probs, None, None, None), ranked, constrain(counts, None)
