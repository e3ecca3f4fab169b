"""The compiled train step of a run, and the operations and the memory that it needs."""

import dataclasses

import jax
from jax.sharding import Mesh

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import Qwen, parameter_count
from qwen_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from qwen_jax.training.state import abstract_state
from qwen_jax.training.step import batch_shapes, compile_train_step, make_train_step


def compile_run(
    model: Qwen, objective, optimizer: OptimizerConfig, train_steps: int, mesh: Mesh, *, batch_size: int,
    sequence_length: int, accumulation: int = 1, seed: int = 0, columns: tuple[str, ...] = (),
) -> jax.stages.Compiled:
    """Compiles the train step of a run from shapes alone, for the devices of `mesh`, whether they exist here or not.

    This is what `Trainer` runs and what `tools/compile_for_tpu.py` measures.

    Raises:
      ValueError: batch, model or mesh do not divide.
    """
    schedule, transform = learning_rate_schedule(optimizer, train_steps), make_optimizer(optimizer, train_steps)
    shapes = batch_shapes(mesh, batch_size, sequence_length, accumulation, columns)
    step = make_train_step(model, transform, objective, schedule, seed=seed, accumulation=accumulation)
    return compile_train_step(step, abstract_state(model, transform, mesh), shapes, mesh)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one token's forward and backward pass, without recomputation.

    matmuls: 6 per parameter that is multiplied by (the embedding is looked up, not multiplied).
    attention: the products of queries with keys and of weights with values.
    """

    matmuls: float
    attention: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.matmuls + self.attention


def model_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = True) -> ModelFlops:
    """Operations per token of training.

    Args:
      causal: count only the keys that a token may see, half of them on average; False is the usual convention, which
        counts all (PaLM, appendix B).
    """
    multiplied = parameter_count(config)
    if not config.tie_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    width = config.num_heads * config.head_dim
    attention = 12.0 * config.num_layers * width * sequence_length * (0.5 if causal else 1.0)
    return ModelFlops(6.0 * multiplied, attention)


def memory_per_device(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device: arguments, outputs, how much of them is aliased, temporaries, and the need of all."""
    analysis = compiled.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes, "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes, "temporaries": analysis.temp_size_in_bytes,
    }
    return {**sizes, "need": sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]}
