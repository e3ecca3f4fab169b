"""Initial weights of a new run: any known format, whole or in part, compared by shapes, not by configuration.

A run may therefore have another context length than its initial weights (Code-Qwen-14B, with 8,192 tokens, from
Qwen-14B with 2,048; report 4), other dropout, or parts that the other model lacks. LoRA adapters that the checkpoint
lacks start fresh; adapters that the model lacks are merged into their kernels.
"""

import logging
import os
from collections.abc import Mapping, Sequence

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from qwen_jax.checkpoints.run_folder import CheckpointError
from qwen_jax.conversion.load import open_weights, place_parameter
from qwen_jax.conversion.mapping import Weights, parameter_shapes
from qwen_jax.conversion.merging import without_adapters
from qwen_jax.conversion.run_folder import SCANNED, RunFolder
from qwen_jax.files import as_path
from qwen_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

# Fields of the configuration that change the function of the same parameters.
ARITHMETIC_FIELDS = ("rope_theta", "norm_epsilon")


class InitialWeights:
    """Parameters of a checkpoint as the start of a run; `check` and `load` read them, the constructor does not."""

    def __init__(
        self,
        path: str | os.PathLike,
        subtree: str | Sequence[str] | Mapping[str, str] | None = None,
        model: ModelConfig | None = None,
    ):
        """Names the weights.

        Args:
          path: a run folder (or the folder of one of its steps), a folder in format qwen, qwen2 or peft, or a
            GGUF file.
          subtree: the parameters to take. None: all, and the two models must have the same. One or more paths, such
            as "layers" or "layers/mlp": these sub-trees. A mapping: path in the trained model to path in the
            checkpoint, where "" is its root, so that {"decoder": ""} starts the decoder of a larger model.
          model: configuration of the trained model; `check` logs a warning where it computes another function with
            the same parameters (another rotary base).
        """
        self.path, self._model = as_path(path, "INITIAL_CHECKPOINT"), model
        # From `check` to `load`: opening a run folder in a bucket copies it.
        self._opened: Weights | None = None
        if subtree is None or isinstance(subtree, Mapping):
            self._subtree = {"": ""} if subtree is None else dict(subtree)
        else:
            self._subtree = {name: name for name in ([subtree] if isinstance(subtree, str) else subtree)}

    def __str__(self) -> str:
        whole = self._subtree == {"": ""}
        return str(self.path) if whole else f"{self.path} ({', '.join(name or 'all' for name in self._subtree)})"

    def check(self, abstract: dict) -> None:
        """Compares paths and shapes; reads no parameter.

        Args:
          abstract: all parameters of the trained model: nested dict of leaves with a `shape`.

        Raises:
          FileNotFoundError, ValueError: the path is no checkpoint, or a damaged one.
          CheckpointError: parameters do not fit; the message names them with both shapes.
        """
        weights = self._open(abstract)
        self._sources(weights, abstract)
        here, there = (config.lora if config else None for config in (self._model, weights.config))
        if here and there and here.scale != there.scale:
            log.warning(
                "the adapters of %s were trained with the scale alpha / rank = %g, and this run computes with %g: set "
                "LoraConfig.alpha to %g to keep it",
                *(self.path, there.scale, here.scale, there.alpha),
            )
        for field in ARITHMETIC_FIELDS if self._model is not None else ():
            here, there = getattr(self._model, field), getattr(weights.config, field)
            if here != there:
                log.warning(
                    "%s was trained with %s %s, and this run computes with %s: set --gin.ModelConfig.%s=%s to keep it",
                    *(self.path, field, there, here, field, there),
                )

    def load(self, abstract: dict) -> dict:
        """Reads the parameters onto their devices; host memory holds one layer of one parameter.

        Args:
          abstract: as for `check`, of ShapeDtypeStructs with shardings.

        Returns:
          Nested dict of jax arrays, one for each parameter taken, with the dtypes and shardings of `abstract`.

        Raises:
          FileNotFoundError, ValueError, CheckpointError: as `check`.
        """
        weights, flat = self._open(abstract), flatten_dict(abstract, sep="/")
        self._opened = None
        sources = self._sources(weights, abstract)
        same = all(target == source for target, source in sources.items()) and len(sources) == len(flat)
        if same and isinstance(weights, RunFolder) and weights.layout == SCANNED:
            return weights.restore(abstract)
        named = tqdm(sources.items(), desc="initial weights", disable=None)
        placed = {
            target: place_parameter(weights, source, flat[target].sharding, flat[target].dtype)
            for target, source in named
        }
        return unflatten_dict(placed, sep="/")

    def _open(self, abstract: dict) -> Weights:
        weights = self._opened = self._opened or open_weights(self.path)
        adapted = any(_is_adapter(path) for path in flatten_dict(abstract, sep="/"))
        return weights if adapted else without_adapters(weights)

    def _sources(self, weights: Weights, abstract: dict) -> dict[str, str]:
        """Path in the trained model to path in the checkpoint, for every parameter taken."""
        expected = {path: tuple(leaf.shape) for path, leaf in flatten_dict(abstract, sep="/").items()}
        if weights.config.lora is None:  # adapters start fresh
            expected = {path: shape for path, shape in expected.items() if not _is_adapter(path)}
        found, sources, problems = parameter_shapes(weights.config), {}, []
        for ours, theirs in self._subtree.items():
            below = [path for path in expected if _is_below(path, ours)]
            if not below:
                problems.append(f"the model has no parameter {ours}")
            sources |= {path: _moved(path, ours, theirs) for path in below}
            unused = sorted({path for path in found if _is_below(path, theirs)} - set(sources.values()))
            problems += [f"{path} {list(found[path])} is there and not in the model" for path in unused]
        for target, source in sources.items():
            name = target if target == source else f"{target} (there {source})"
            if source not in found:
                problems.append(f"{name} {list(expected[target])} is not there")
            elif found[source] != expected[target]:
                problems.append(f"{name} is {list(found[source])} there and {list(expected[target])} in the model")
        if problems:
            raise CheckpointError(
                f"the weights of {self.path} do not fit the model: {'; '.join(problems)}. Choose a model of the same "
                f"shapes, or take a part of the weights (subtree)"
            )
        return sources


class JoinedWeights:
    """Parameters of several checkpoints, such as a decoder and an image encoder; of two, the later one counts.

    Attributes:
      path: that of the first one, whose vocabulary the model has.
    """

    def __init__(self, parts: Sequence[InitialWeights]):
        """Reads nothing."""
        self._parts, self.path = parts, parts[0].path

    def __str__(self) -> str:
        return " and ".join(map(str, self._parts))

    def check(self, abstract: dict) -> None:
        """As `InitialWeights.check`, of each."""
        for part in self._parts:
            part.check(abstract)

    def load(self, abstract: dict) -> dict:
        """As `InitialWeights.load`, of all of them."""
        flat: dict[str, jax.Array] = {}
        for part in self._parts:
            flat |= flatten_dict(part.load(abstract), sep="/")
        return unflatten_dict(flat, sep="/")


def _is_adapter(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}/")


def _moved(path: str, prefix: str, other: str) -> str:
    return "/".join(part for part in (other, path[len(prefix) :].strip("/")) if part)
