"""Keys and values of recent prompts and replies, so that the next prompt that begins like one computes its rest alone.

The idea is that of vLLM's and SGLang's prefix caches (Kwon et al. 2023; Zheng et al. 2024): tokens are kept in blocks
of a fixed size, and a block is found by its tokens and the block before it.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.programs import BLOCK_TOKENS, CachedPrefixes, Programs
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.positions import dynamic_ntk_alpha


class _Block(NamedTuple):
    """A block in use: `place` in the pool, and a `number` that no other block ever has."""

    place: int
    number: int


class PrefixIndex:
    """Which block of a pool holds which tokens after which others.

    The blocks that were used longest ago make room. Whoever uses a block uses all before it, so the last block of a
    text goes before its first.
    """

    def __init__(self, capacity: int):
        """An empty index of a pool of `capacity` blocks."""
        self.capacity = capacity
        # By the number of the block before (of the first, the root) and the block's tokens; least recently used first.
        self._blocks: OrderedDict[tuple[Hashable, tuple[int, ...]], _Block] = OrderedDict()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Number of blocks in use."""
        return len(self._blocks)

    def find(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """Places of the longest run of whole blocks that `tokens` begin with, which counts as a use of them.

        Args:
          root: texts have blocks in common only under equal roots.
        """
        path = self._path(root, tokens)
        self._touch(path)
        return [self._blocks[key].place for key in path]

    def add(self, root: Hashable, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Takes blocks for all whole blocks of `tokens` that have none, as far as the pool goes.

        Returns:
          (which block of `tokens`, its place in the pool) of the new ones, whose content the caller has to write. What
          the places held before is forgotten.
        """
        path = self._path(root, tokens)
        self._touch(path)
        added = []
        for index in range(len(path), min(len(tokens) // BLOCK_TOKENS, self.capacity)):
            parent = self._blocks[path[-1]].number if path else (root,)
            place = len(self._blocks)
            if place == self.capacity:
                place = self._blocks.popitem(last=False)[1].place
            path.append((parent, _block_of(tokens, index)))
            self._blocks[path[-1]] = _Block(place, next(self._numbers))
            added.append((index, place))
        self._touch(path)
        return added

    def _path(self, root: Hashable, tokens: Sequence[int]) -> list[tuple[Hashable, tuple[int, ...]]]:
        """Keys of the blocks that `tokens` begin with."""
        path: list[tuple[Hashable, tuple[int, ...]]] = []
        parent: Hashable = (root,)  # equal to no number
        for index in range(len(tokens) // BLOCK_TOKENS):
            key = (parent, _block_of(tokens, index))
            block = self._blocks.get(key)
            if block is None:
                break
            path.append(key)
            parent = block.number
        return path

    def _touch(self, path: Sequence[tuple[Hashable, tuple[int, ...]]]) -> None:
        # From the last to the first: no block is ever older than one that follows it.
        for key in reversed(path):
            self._blocks.move_to_end(key)


def _block_of(tokens: Sequence[int], index: int) -> tuple[int, ...]:
    return tuple(tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS])


class PrefixCache:
    """A pool of blocks on the devices, and what they hold.

    Keys are those of one set of weights: `clear` before others come.

    Attributes:
      version: how often it was cleared. What a row computed under another version may not be kept.
    """

    def __init__(self, call: Programs, config: ModelConfig, tokens: int):
        """Holds nothing yet, on the devices neither.

        Args:
          call: runs the programs.
          tokens: the largest number of tokens in the pool.
        """
        self._call, self._config = call, config
        self._capacity = tokens // BLOCK_TOKENS
        self.version = -1
        self.clear()

    def clear(self) -> None:
        """Forgets everything and frees the pool."""
        self._index = PrefixIndex(self._capacity)
        self._pool: tuple[KVCache, ...] | None = None
        self.version += 1

    def find(self, prompt: Sequence[int]) -> list[int]:
        """Places of the blocks that `prompt` begins with; its last token is never among them."""
        return self._index.find(self._root(len(prompt)), prompt[:-1]) if len(prompt) > BLOCK_TOKENS else []

    def prefixes(self, places: Sequence[Sequence[int]], prompts: np.ndarray) -> CachedPrefixes:
        """Prefixes of prompts, for the program that computes the rest.

        Args:
          places: of the blocks that each begins with.
          prompts: int32 [rows, slots], the whole prompts.
        """
        assert self._pool is not None  # it holds these blocks
        blocks = np.full((len(places), prompts.shape[1] // BLOCK_TOKENS), self._capacity, np.int32)
        for row, own in enumerate(places):
            blocks[row, : len(own)] = own
        lengths = np.asarray([len(own) * BLOCK_TOKENS for own in places], np.int32)
        return CachedPrefixes(self._pool, blocks, lengths, prompts)

    def keep(
        self, layers: tuple[KVCache, ...], shape: tuple[str, ...], texts: Sequence[tuple[int, int, Sequence[int]]]
    ) -> None:
        """Copies blocks that the pool does not have from rows of a batch.

        Args:
          layers: keys and values of the batch; `shape` names their sizes.
          texts: (row, number of tokens of the prompt, prompt and continuation) of each row; only tokens whose keys the
            row has, and rows of this `version`.
        """
        # A place may be taken twice within one call: the later text has it.
        sources = {
            place: (row, index)
            for row, prompt_length, tokens in texts
            for index, place in self._index.add(self._root(prompt_length), tokens)
        }
        if not sources:
            return
        count = 1
        while count < len(sources):
            count *= 4
        if self._pool is None:
            self._pool = self._call(
                programs.empty_pool, ("pool", f"{self._capacity} blocks"), self._config, self._capacity
            )
        places = np.full(count, self._capacity, np.int32)
        rows, blocks = np.zeros((2, count), np.int32)
        places[: len(sources)] = list(sources)
        rows[: len(sources)], blocks[: len(sources)] = zip(*sources.values(), strict=True)
        key = ("keep", *shape, f"{count} blocks of {self._capacity}")
        self._pool = self._call(programs.keep, key, self._pool, layers, rows, blocks, places)

    def _root(self, prompt_length: int) -> float:
        """What keys depend on beside the tokens up to them: with dynamic NTK, a function of the prompt's length."""
        return _alpha(prompt_length, self._config.context_length) if self._config.use_dynamic_ntk else 1.0


@functools.lru_cache(maxsize=1 << 16)
def _alpha(prompt_length: int, context_length: int) -> float:
    return float(dynamic_ntk_alpha(jnp.asarray(prompt_length), context_length))
