"""Low-rank adapters (LoRA, arXiv 2106.09685): a small trained product beside a frozen kernel.

A projection with an adapter computes x·W + (alpha / rank)·x·A·B. `lora_a` has the kernel's input axes and the rank,
`lora_b` the rank and the kernel's output axes, so that flattened they are the two matrices of other software.
"""

import dataclasses

import jax
import numpy as np

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections of a block have an adapter, and how strong it is.

    The defaults but the rank and the dropout are those of the released fine-tuning script of Qwen (QwenLM/Qwen
    finetune.py: rank 64, alpha 16, dropout 0.05, all projections of a block).

    Attributes:
      rank: of the product; must be positive.
      alpha: numerator of the scale alpha / rank.
      targets: names of projections, of `PROJECTIONS`; `output` is that of attention. Embedding and output projection of
        the vocabulary have no adapters: train them whole, by a parameter group.
      dropout: probability that an input of `lora_a` is set to 0; used only when training.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    dropout: float = 0.0

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoraConfig.rank must be a positive integer, found {self.rank!r}")
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"LoraConfig.alpha must be a positive number, found {self.alpha!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout must be in [0, 1), found {self.dropout!r}")
        named = (self.targets,) if isinstance(self.targets, str) else self.targets
        if not isinstance(named, list | tuple):
            raise ValueError(f"LoraConfig.targets must be a list of {', '.join(PROJECTIONS)}; found {named!r}")
        if wrong := [name for name in named if name not in PROJECTIONS]:
            raise ValueError(
                f"LoraConfig.targets must be of {', '.join(PROJECTIONS)}; found {wrong[0]!r}. Embedding and output of "
                f"the vocabulary are trained whole (ParameterGroup 'token_embedding|output'), not adapted"
            )
        if not named:
            raise ValueError(f"LoraConfig.targets is empty: name some of {', '.join(PROJECTIONS)}, or set no lora")
        # One order, so that equal sets are equal configurations.
        object.__setattr__(self, "targets", tuple(name for name in PROJECTIONS if name in named))

    @property
    def scale(self) -> float:
        """Factor on the product of the two matrices."""
        return self.alpha / self.rank


def adapter_equations(equation: str) -> tuple[str, str, int]:
    """Einsums of a projection's adapter.

    Args:
      equation: of activation and kernel, such as `bld,dhk->bhlk`; the kernel's input axes come first.

    Returns:
      (einsum of activation and `lora_a`, einsum of that and `lora_b`, number of the kernel's input axes).
    """
    operands, result = equation.split("->")
    of_x, of_kernel = operands.split(",")
    inputs = [axis for axis in of_kernel if axis not in result]
    outputs = of_kernel[len(inputs) :]
    kept = "".join(axis for axis in of_x if axis not in inputs)
    return f"{of_x},{''.join(inputs)}r->{kept}r", f"{kept}r,r{outputs}->{result}", len(inputs)


def init_lora_a(rng: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Uniform in ±1/sqrt(inputs), as peft starts (kaiming uniform with a = sqrt(5)); the last axis is the rank."""
    bound = float(np.prod(shape[:-1])) ** -0.5
    return jax.random.uniform(rng, shape, dtype, -bound, bound)


def merged_kernel(kernel, lora_a, lora_b, scale: float):
    """kernel + scale · lora_a · lora_b in float32.

    Args:
      kernel: [*inputs, *outputs] of one block, or [layers, *inputs, *outputs] of all.
      lora_a, lora_b: [*inputs, rank] and [rank, *outputs], with the layers before them as the kernel has.

    Returns:
      float32, of the kernel's kind (NumPy or JAX) and shape. Round it once, at the end: the sum of rounded parts is
      another model.
    """
    stacked = lora_a.ndim + lora_b.ndim - 2 - kernel.ndim
    layers, rank = kernel.shape[:stacked], lora_a.shape[-1]
    a = lora_a.astype(np.float32).reshape(*layers, -1, rank)
    b = lora_b.astype(np.float32).reshape(*layers, rank, -1)
    return kernel.astype(np.float32) + (scale * (a @ b)).reshape(kernel.shape)


def merge(params: dict, config: LoraConfig) -> dict:
    """Parameters of a model with adapters as those of one without; merged kernels are float32.

    Args:
      params: nested dict of arrays, layers stacked or one tree for each block.
    """
    if "lora_a" in params:
        kernel = merged_kernel(params["kernel"], params["lora_a"], params["lora_b"], config.scale)
        return {**{name: leaf for name, leaf in params.items() if not name.startswith("lora_")}, "kernel": kernel}
    return {name: merge(part, config) if isinstance(part, dict) else part for name, part in params.items()}
