"""What the models of an `ActorCritic` say of rollouts: one program, compiled once, run over a few rows at a time."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.batch_spec import Column
from qwen_jax.sharding import use_mesh
from qwen_jax.training.step import batch_shapes


class Scorer:
    """Log-probabilities, values and rewards of rows [rows, length]; every process of a job gets all of them."""

    def __init__(self, model: ActorCritic, mesh: Mesh, rows: int, length: int, temperature: float, top_p: float):
        """Compiles nothing yet.

        Args:
          rows: computed at a time.
          temperature, top_p: of sampling.
        """
        self._model, self._mesh, self._temperature, self._top_p = model, mesh, temperature, top_p
        columns = [Column("tokens", "int32", (length,), ("length",))]
        if model.reward_config is not None:
            columns += [Column("reward_tokens", "int32", (length,), ("length",)), Column("last", "int32", (), ())]
        self._shapes = batch_shapes(mesh, rows, columns)
        self._rows = rows

    def compile(self, params: dict) -> None:
        """Compiles for parameters of these shapes and shardings (a pytree of ShapeDtypeStructs)."""
        shardings = jax.tree.map(lambda x: x.sharding, (params, self._shapes))
        replicated = NamedSharding(self._mesh, PartitionSpec())
        with use_mesh(self._mesh):
            jitted = jax.jit(self._score, in_shardings=shardings, out_shardings=replicated)
            self._compiled = jitted.lower(params, self._shapes).compile()

    def _score(self, params: dict, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        model, tokens = self._model, batch["tokens"]
        temperature = self._temperature
        policy = model.token_statistics(
            params["policy"], tokens, temperature=temperature, top_p=self._top_p, with_entropy=True
        )
        reference = model.token_statistics(params["reference"], tokens, temperature=temperature, top_p=None)
        assert policy.entropy is not None and policy.nucleus_log_probs is not None  # both were requested
        found = {
            "log_probs": policy.log_probs,
            "nucleus_log_probs": policy.nucleus_log_probs,
            "entropy": policy.entropy,
            "reference_log_probs": reference.log_probs,
        }
        if model.value_config is not None:
            found["values"] = model.values(params["value"], tokens)
        if model.reward_config is not None:
            found["scores"] = model.rewards(params["reward"], batch["reward_tokens"], batch["last"])
        return found

    def __call__(self, params: dict, tokens: np.ndarray, last: np.ndarray, end_id: int) -> dict[str, np.ndarray]:
        """The statistics of rows.

        Args:
          tokens: int32 [rows, length].
          last: int32 [rows], position of the last token of each. The reward is read there, and the token that the
            reward model sees there is `end_id`, whether the response has ended or not: a reward model says nothing
            elsewhere.

        Returns:
          float32 [rows, length], each aligned with its token: "log_probs" of the policy and "reference_log_probs" over
          the whole vocabulary, "nucleus_log_probs", "entropy" where the token was chosen, "values" if there is a value
          model; and "scores" [rows] if there is a reward model.
        """
        given = {"tokens": tokens}
        if "last" in self._shapes:
            closed = tokens.copy()
            closed[np.arange(len(tokens)), last] = end_id
            given |= {"reward_tokens": closed, "last": last}
        parts = []
        for start in range(0, len(tokens), self._rows):
            part = {name: values[start : start + self._rows] for name, values in given.items()}
            parts.append(self._compiled(params, place_rows(part, self._shapes)))
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def place_rows(arrays: dict[str, np.ndarray], shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays that every process has whole, as sharded arrays of these shapes."""
    return {
        name: jax.make_array_from_callback(
            shape.shape,
            shape.sharding,
            lambda index, name=name, shape=shape: np.asarray(arrays[name][index], shape.dtype),
        )
        for name, shape in shapes.items()
    }
