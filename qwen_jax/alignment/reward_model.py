"""Rewards of given conversations, many at a time, in buckets of lengths."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.inference.admission import PREFILL_ROWS, SMALLEST_PROMPT, bucket, prefill_rows
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import batch_sharding, num_batch_shards, use_mesh


class RewardModel:
    """A reward model on its devices (report 3.2.1).

    A conversation's reward is the scalar head's number at its last token, which is to be the `<|im_end|>` of the
    response (`qwen_jax.data.chatml.encode_conversation`). It depends on no other conversation, on no padding, and on no
    number of devices beyond the rounding of the compute dtype. Programs are compiled for powers of two: of lengths, and
    of rows.
    """

    def __init__(self, model: Qwen, params, mesh: Mesh):
        """Compiles nothing yet.

        Args:
          model, params: of a model with a scalar head, as `load_pretrained` returns them on `mesh`.

        Raises:
          ValueError: the model has no scalar head.
        """
        if model.config.head != "scalar":
            raise ValueError(
                "this is a language model, with an output projection and no scalar head: name a reward model, such as "
                "the OUTPUT_DIR of gin/runs/reward_tiny.gin"
            )
        self._params, self._mesh, self.config = params, mesh, model.config
        self._ways = num_batch_shards(mesh)

        def last_scalars(params, tokens, lengths):
            scalars = jnp.asarray(model.apply({"params": params}, tokens, method="scalars"))
            return jnp.take_along_axis(scalars, (lengths - 1)[:, None], axis=1)[:, 0]

        self._program = jax.jit(last_scalars, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a conversation cannot be scored, or None."""
        if not len(ids):
            return "it has no token"
        if len(ids) > self.config.context_length:
            return f"it has {len(ids)} tokens, and the reward model's context_length is {self.config.context_length}"
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            return (
                f"it has ids from {min(ids)} to {max(ids)}, and the reward model {self.config.vocab_size} vocabulary "
                f"rows: is it of another vocabulary?"
            )
        return None

    def score(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        """The rewards of conversations of token ids: float32 [conversations], in their order.

        Raises:
          ValueError: a conversation cannot be scored; the message has its index.
        """
        rewards = np.empty(len(conversations), np.float32)
        for indices, found in self.score_in_groups(conversations):
            rewards[indices] = found
        return rewards

    def score_in_groups(self, conversations: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """As `score`, but yields (indices, rewards) of those that are computed together."""
        for index, ids in enumerate(conversations):
            if (problem := self.problem(ids)) is not None:
                raise ValueError(f"conversation {index} cannot be scored: {problem}")
        groups: dict[int, list[int]] = {}
        for index, ids in enumerate(conversations):
            size = min(bucket(len(ids), SMALLEST_PROMPT), self.config.context_length)
            groups.setdefault(size, []).append(index)
        for size, indices in sorted(groups.items()):
            most = prefill_rows(size) * self._ways
            for start in range(0, len(indices), most):
                some = indices[start : start + most]
                yield some, self._rows([conversations[index] for index in some], size)

    def _rows(self, conversations: Sequence[Sequence[int]], size: int) -> np.ndarray:
        count = next(n * self._ways for n in PREFILL_ROWS if n * self._ways >= len(conversations))
        # Padding follows the tokens, which do not see it.
        tokens, lengths = np.zeros((count, size), np.int32), np.ones(count, np.int32)
        for row, ids in enumerate(conversations):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        with use_mesh(self._mesh):
            placed = [
                jax.device_put(array, batch_sharding(self._mesh, (None,) * (array.ndim - 1)))
                for array in (tokens, lengths)
            ]
            found = self._program(self._params, *placed)
        return np.asarray(found)[: len(conversations)]
