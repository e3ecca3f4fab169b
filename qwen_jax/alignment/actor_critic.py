"""The models of PPO and GRPO as one: sub-trees `policy`, `value`, `reference` and `reward` of one parameter tree.

The Trainer sees a single model. Parameter groups train `policy` and `value` and freeze the others, so one sharded state
and one checkpoint hold all of them (report 3.2.2).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.log_probs import TokenStatistics, token_statistics
from qwen_jax.models.transformer import Qwen
from qwen_jax.training.model import InitialWeights


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """A policy with the models beside it; a `qwen_jax.training.model.Model`.

    All are decoders over one vocabulary. Reward and value model see prompt and response (N). None has dropout here, in
    no pass.

    Attributes:
      config: of the policy, and of the reference, which begins as the same.
      value_config: of the value model, with a scalar head; None has none (GRPO).
      reward_config: of the reward model, with a scalar head; None: rewards are computed by a program.
    """

    config: ModelConfig
    value_config: ModelConfig | None
    reward_config: ModelConfig | None

    def __post_init__(self):
        if self.config.head != "tokens":
            raise ValueError("the policy needs ModelConfig.head = 'tokens': is the checkpoint that of a reward model?")
        for name in ("value", "reward"):
            config = getattr(self, f"{name}_config")
            if config is not None and config.head != "scalar":
                raise ValueError(f"the {name} model needs ModelConfig.head = 'scalar', found {config.head!r}")
            if config is not None and config.vocab_size != self.config.vocab_size:
                raise ValueError(
                    f"the {name} model has {config.vocab_size} rows of vocabulary and the policy "
                    f"{self.config.vocab_size}: they must share one vocabulary"
                )

    @property
    def policy(self) -> Qwen:
        """The policy's module, which is the reference's, too."""
        return Qwen(self.config)

    @property
    def has_dropout(self) -> bool:
        """Never."""
        return False

    def init_params(self, rng: jax.Array) -> dict:
        """Random parameters; the reference equals the policy, and the value model begins at 0 everywhere (N)."""
        keys = jax.random.split(rng, 3)
        policy = self.policy.init_params(keys[0])
        params = {"policy": policy, "reference": policy}
        if self.value_config is not None:
            value = Qwen(self.value_config).init_params(keys[1])
            params["value"] = {**value, "score": jax.tree.map(jnp.zeros_like, value["score"])}
        if self.reward_config is not None:
            params["reward"] = Qwen(self.reward_config).init_params(keys[2])
        return params

    def attention(self, length: int | None, packed: bool, mesh: Mesh) -> str:
        """Name of the attention kernel of the policy; see `Qwen.attention`."""
        return self.policy.attention(length, packed, mesh)

    def apply(self, variables: dict, *arguments, **options):
        """Applies the policy."""
        return self.policy.apply({"params": variables["params"]["policy"]}, *arguments, **options)

    def token_statistics(
        self, params: dict, tokens: jax.Array, *, temperature: float, top_p: float | None, with_entropy: bool = False
    ) -> TokenStatistics:
        """`token_statistics` of the tokens of rows themselves, each after those before it.

        Args:
          params: of the policy or of the reference.
          tokens: int32 [rows, length], filled up at the end.

        Returns:
          Arrays [rows, length], aligned with the token. What stands at the first one means nothing.
        """
        hidden = _apply(self.config, params, tokens, method="hidden_states")
        kernel = _apply(self.config, params, method="output_kernel")
        found = token_statistics(
            hidden,
            kernel,
            jnp.roll(tokens, -1, axis=1),
            temperature=temperature,
            with_entropy=with_entropy,
            top_p=top_p,
        )
        return jax.tree.map(_to_token, found)

    def values(self, params: dict, tokens: jax.Array) -> jax.Array:
        """Values of the states in which tokens were chosen, float32 [rows, length]; see `token_statistics`."""
        assert self.value_config is not None  # only objectives with a value model ask
        return _to_token(_apply(self.value_config, params, tokens, method="scalars"))

    def rewards(self, params: dict, tokens: jax.Array, at: jax.Array) -> jax.Array:
        """The reward model's numbers, float32 [rows], at positions `at` int32 [rows] of tokens [rows, length]."""
        assert self.reward_config is not None  # only called where there is one
        scalars = _apply(self.reward_config, params, tokens, method="scalars")
        return jnp.take_along_axis(scalars, at[:, None], axis=1)[:, 0]


def _apply(config: ModelConfig, params: dict, *arguments, **options) -> Any:
    return Qwen(config).apply({"params": params}, *arguments, **options)


def _to_token(x: jax.Array) -> jax.Array:
    """Moves what position t says of token t + 1 to position t + 1."""
    return jnp.roll(x, 1, axis=1)


class SeveralInitialWeights:
    """Initial weights of sub-trees from several checkpoints; a `qwen_jax.training.model.InitialWeights`."""

    def __init__(self, *parts: InitialWeights):
        """The parts must not overlap."""
        self._parts = parts

    def __str__(self) -> str:
        return " and ".join(map(str, self._parts))

    def check(self, abstract: dict) -> None:
        """As `InitialWeights.check`, each part in turn."""
        for part in self._parts:
            part.check(abstract)

    def load(self, abstract: dict) -> dict:
        """As `InitialWeights.load`: the sub-trees of all parts."""
        loaded: dict = {}
        for part in self._parts:
            loaded = _joined(loaded, part.load(abstract))
        return loaded


def _joined(tree: dict, other: dict) -> dict:
    shared = {name: _joined(tree[name], other[name]) for name in tree.keys() & other.keys()}
    return {**tree, **other, **shared}
