"""The key-value cache of a layer."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.config import ModelConfig
from qwen_jax.sharding import constrain, platform


def cache_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype that keys and values are kept in: the compute dtype, on CPUs float32.

    Products of CPUs are float32's: each step would convert the whole cache of bfloat16, which takes longer than to read
    it. The values are the same.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else config.compute_dtype


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of one layer. Slot j of a row holds position j, unless several texts lie in the row.

    key, value: [rows, kv_heads, slots, head_dim], values of the compute dtype in `cache_dtype`.
    rows: int32 [batch], which rows of the arrays are read and written; None: all of them.
    """

    key: jax.Array
    value: jax.Array
    rows: jax.Array | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "KVCache":
        """Zeros for `batch` rows of at most `slots` positions."""
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        names = ("batch", "kv_heads", None, None)
        return cls(*(constrain(jnp.zeros(shape, cache_dtype(config)), *names) for _ in range(2)))

    def of_rows(self, rows: jax.Array | None) -> "KVCache":
        """The same arrays, of which `rows` are read and written. A row may be named twice, with the same content."""
        return dataclasses.replace(self, rows=rows)

    def write(self, starts: jax.Array, key: jax.Array, value: jax.Array) -> "KVCache":
        """Puts key and value [batch, kv_heads, length, head_dim] at each row's positions from `starts` [batch] on.

        The last of them must be a slot: otherwise XLA moves all of them back.
        """
        return dataclasses.replace(
            self, key=self._put(self.key, key, starts), value=self._put(self.value, value, starts)
        )

    def _put(self, cache: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
        new = new.astype(cache.dtype)
        # Updates of slices are done in place. XLA copies the whole cache for the batched form of a single one.
        if new.shape[0] == 1:
            row = 0 if self.rows is None else self.rows[0]
            written = jax.lax.dynamic_update_slice(cache, new, (row, 0, starts[0], 0))
        elif self.rows is None:
            update = jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice(row, part, (0, start, 0)))
            written = update(cache, new, starts)
        else:
            numbers = jax.lax.ScatterDimensionNumbers((1, 2, 3), (0,), (0, 2))
            written = jax.lax.scatter(cache, jnp.stack([self.rows, starts], axis=1), new, numbers, mode="clip")
        return constrain(written, "batch", "kv_heads", None, None)

    def block(self, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Key and value, each [batch, kv_heads, size, head_dim], of the slots from `first` (int32 scalar) on."""
        return self._cut(self.key, first, size), self._cut(self.value, first, size)

    def _cut(self, cache: jax.Array, first: jax.Array, size: int) -> jax.Array:
        if self.rows is None:
            return jax.lax.dynamic_slice_in_dim(cache, first, size, axis=2)
        _, heads, _, width = cache.shape
        if len(self.rows) == 1:
            return jax.lax.dynamic_slice(cache, (self.rows[0], 0, first, 0), (1, heads, size, width))
        numbers = jax.lax.GatherDimensionNumbers((1, 2, 3), (0,), (0, 2))
        indices = jnp.stack([self.rows, jnp.full_like(self.rows, first)], axis=1)
        found = jax.lax.gather(cache, indices, numbers, (1, heads, size, width), mode="clip")
        return constrain(found, "batch", "kv_heads", None, None)

    @property
    def slots(self) -> int:
        """Number of positions of a row."""
        return self.key.shape[2]
