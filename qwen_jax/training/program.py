"""The compiled train step of a run, and estimates of its operations, its memory and its traffic between devices."""

import dataclasses
import math
import os
from collections.abc import Collection, Sequence

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from qwen_jax.batch_spec import Column, is_packed, row_length
from qwen_jax.hardware import GIB
from qwen_jax.models.build import parameter_count
from qwen_jax.models.config import ModelConfig
from qwen_jax.programs.account import CollectiveTotal
from qwen_jax.training.model import Model
from qwen_jax.training.objective import Objective
from qwen_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from qwen_jax.training.parameter_groups import assign_groups
from qwen_jax.training.state import TrainState, abstract_state, boxed_shapes
from qwen_jax.training.step import batch_shapes, compile_train_step, make_train_step


class TooLittleMemory(ValueError):
    """Parameters, optimizer state and gradients alone are more than a device holds."""


def compile_run(
    model: Model,
    objective: Objective,
    optimizer: OptimizerConfig,
    train_steps: int,
    mesh: Mesh,
    *,
    batch_size: int,
    columns: Sequence[Column],
    accumulation: int = 1,
    seed: int = 0,
    compiler_options: dict | None = None,
) -> jax.stages.Compiled:
    """Compiles the train step of a run from shapes alone, for the devices of `mesh`, whether they exist here or not.

    `Trainer` runs this program, and `tools/compile_for_tpu.py` measures it.

    Args:
      compiler_options: XLA's, by name; those of `gin/hardware/`.

    Raises:
      ValueError: batch, model or mesh do not divide, or the configured attention kernel cannot run.
    """
    model.attention(row_length(columns), is_packed(columns), mesh)
    rates, transform = learning_rates(optimizer, train_steps), make_optimizer(optimizer, train_steps)
    shapes = batch_shapes(mesh, batch_size, columns, accumulation)
    step = make_train_step(model, transform, objective, rates, columns, seed=seed, accumulation=accumulation)
    state = abstract_state(model, transform, mesh, optimizer.groups, objective.initial_extra)
    return compile_train_step(step, state, shapes, mesh, compiler_options)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one token's forward and backward pass, without recomputation.

    matmuls: 6 per parameter that is multiplied by (the embedding is looked up, not multiplied).
    attention: the products of queries with keys and of weights with values.
    images: those of the pictures of a row, over its tokens.
    """

    matmuls: float
    attention: float
    images: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.matmuls + self.attention + self.images


def model_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    causal: bool = True,
    *,
    images_per_row: int = 0,
    frozen: Collection[str] = (),
) -> ModelFlops:
    """Operations per token of training.

    Args:
      causal: count only the keys that a token may see, half of them on average; False is the usual convention, which
        counts all (PaLM, appendix B).
      images_per_row: pictures of a row. Rows with fewer compute as many.
      frozen: the parts of `frozen_parts` that do not learn. A frozen decoder has no gradients of its parameters, and a
        frozen encoder has no backward pass.
    """
    multiplied = parameter_count(dataclasses.replace(config, vision=None))
    if not config.tie_embeddings or config.head == "scalar":
        multiplied -= config.vocab_size * config.hidden_size
    width = config.num_heads * config.head_dim
    attention = 12.0 * config.num_layers * width * sequence_length * (0.5 if causal else 1.0)
    matmuls = (4.0 if DECODER in frozen else 6.0) * multiplied
    images = images_per_row * image_flops(config, 1 if ENCODER in frozen else 3) if images_per_row else 0.0
    return ModelFlops(matmuls, attention, images / sequence_length)


ENCODER, DECODER = "encoder", "decoder"


def frozen_parts(model: Model, optimizer: OptimizerConfig) -> set[str]:
    """Of the decoder and the image encoder (without the resampler) those of which no parameter learns."""
    if not optimizer.groups:
        return set()
    shapes = nn.meta.unbox(boxed_shapes(model))
    learns: dict[str, bool] = {}
    for path, group in assign_groups(list(flatten_dict(shapes, sep="/")), optimizer.groups).items():
        part = ENCODER if path.startswith("vision/layers/") else "" if path.startswith("vision/") else DECODER
        learns[part] = learns.get(part, False) or not group.frozen
    return {part for part, any_learns in learns.items() if part and not any_learns}


def image_flops(config: ModelConfig, passes: int = 3) -> float:
    """Operations of one picture of `config.vision` in the encoder and the resampler.

    Args:
      passes: of the encoder: 3 with the backward pass, which is twice the forward pass, or 1. The resampler has 3.
    """
    vision, hidden = config.vision, config.hidden_size
    assert vision is not None  # callers ask for pictures
    patches, width, queries = (vision.image_size // vision.patch_size) ** 2, vision.width, vision.num_queries
    layer = 2.0 * patches * width * (4 * width + 2 * vision.mlp_size) + 4.0 * patches**2 * width
    encoder = 2.0 * patches * vision.patch_size**2 * 3 * width + vision.num_layers * layer
    # Input, keys and values; attention. Below, its output and the last projection. Queries are projected once for all.
    resampler = 2.0 * patches * (width * hidden + 2 * hidden**2) + 4.0 * queries * patches * hidden
    return passes * encoder + 3 * (resampler + 2 * 2.0 * queries * hidden**2)


def memory_per_device(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device: arguments, outputs, how much of them is aliased, temporaries, and the need of all."""
    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPUs, GPUs and TPUs all give it
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return {**sizes, "need": sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]}


def shard_bytes(tree) -> int:
    """Bytes that one device holds of a pytree of arrays or of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes_per_device(state: TrainState) -> dict[str, int]:
    """Bytes that no schedule of an update can do without: parameters, optimizer state and all gradients at once.

    All gradients exist together, because clipping needs their norm. They are counted in bfloat16, the least that a
    compiler could keep of them; activations and everything temporary come on top. Frozen parameters, where there are
    any, have neither gradients nor optimizer state.
    """
    parameters = shard_bytes(state.params)
    gradients = sum(2 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    needed = {"parameters": parameters, "optimizer": shard_bytes(state.opt_state), "gradients": gradients}
    return needed | ({"frozen parameters": shard_bytes(state.frozen)} if state.frozen else {})


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a program can use on one device of `mesh`, or None where the backend reports no limit.

    Virtual devices of a CPU share the memory of the computer equally.
    """
    device = mesh.local_devices[0] if mesh.local_devices else mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(len(mesh.local_devices), 1)
    return (device.memory_stats() or {}).get("bytes_limit")


def check_run(
    model: Model,
    optimizer: OptimizerConfig,
    train_steps: int,
    mesh: Mesh,
    *,
    batch_size: int,
    columns: Sequence[Column],
    accumulation: int = 1,
    memory: int | None = None,
) -> dict[str, int]:
    """Checks, before compiling, that batch, model and mesh divide and that the state can fit.

    Args:
      memory: bytes that a program can use on one device; None skips the check.

    Returns:
      `state_bytes_per_device`.

    Raises:
      ValueError: batch, model or mesh do not divide.
      TooLittleMemory: the state does not fit.
    """
    batch_shapes(mesh, batch_size, columns, accumulation)
    state = abstract_state(model, make_optimizer(optimizer, train_steps), mesh, optimizer.groups)
    needed = state_bytes_per_device(state)
    if memory is not None:
        check_memory(needed, memory, sum(leaf.size for leaf in jax.tree.leaves(state.all_params)), mesh)
    return needed


def trained_count(model: Model, optimizer: OptimizerConfig, train_steps: int, mesh: Mesh) -> int:
    """Number of the parameters of a model that the groups of `optimizer` do not freeze."""
    state = abstract_state(model, make_optimizer(optimizer, train_steps), mesh, optimizer.groups)
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def check_memory(needed: dict[str, int], memory: int, parameters: int, mesh: Mesh) -> None:
    """Refuses a state that does not fit on a device.

    Args:
      needed: bytes on one device, by part.
      memory: bytes that a program can use on one device.
      parameters: of the model, for the message.

    Raises:
      TooLittleMemory: the message names the parts, and the settings to change.
    """
    if sum(needed.values()) > memory:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise TooLittleMemory(
            f"too little memory: the state of {parameters:,} parameters needs "
            f"{sum(needed.values()) / GIB:.2f} GiB on each of {mesh.size} device(s) ({parts}), before any activation, "
            f"and a device has {memory / GIB:.2f} GiB: use more devices over MeshConfig.fsdp or .tensor, or a smaller "
            f"model"
        )


def least_between_slices(config: ModelConfig, mesh: Mesh, slices: int, trained: int | None = None) -> float:
    """Bytes that a device must send to other slices in one step, in the compute dtype.

    Parameters are split within a slice only, so it is the all-reduce of the gradients of its share.

    Args:
      trained: number of parameters that are not frozen; None: all.
    """
    trained = parameter_count(config) if trained is None else trained
    share = trained / (mesh.size / mesh.shape["data"])
    return 2 * (slices - 1) / slices * share * config.compute_dtype.itemsize


def least_collectives(
    config: ModelConfig, mesh: Mesh, tokens: int, accumulation: int = 1, trained: int | None = None
) -> dict[str, CollectiveTotal]:
    """What one device must exchange in one step, however the layout of `mesh` is programmed, by kind.

    Counted, in the compute dtype (n: devices of the axis):
      parameters split over fsdp and sequence: gathered for the forward and for the backward pass of every accumulation
        part (the embedding and the output projection once: rows are looked up in the forward pass alone, and the loss
        computes its gradients with its logits); their gradients scattered once (an all-reduce instead moves twice as
        much on the wire).
      parameters held by several devices (along data, and along axes that do not split them): gradients of a device's
        share all-reduced once.
      tensor: activations all-reduced four times per block and part (after attention and FFN, and their mirror images
        in the backward pass), once after the embedding and once before the output projection.
      sequence: keys and values of each block gathered for the forward and for the backward pass, their gradients
        scattered.
    Norms, biases, the loss's sums and token ids are left out. Frozen parameters are gathered, and have no gradients.

    Args:
      trained: number of parameters that are not frozen; None: all.
    """
    size, axis = config.compute_dtype.itemsize, lambda name: mesh.shape.get(name, 1)
    held = parameter_count(config) / axis("tensor")
    with_gradients = held if trained is None else trained / axis("tensor")
    once = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size / axis("tensor")
    split = axis("fsdp") * axis("sequence")
    rows = tokens / (axis("data") * axis("fsdp"))  # tokens of the rows that a device works on, in all parts
    found: dict[str, CollectiveTotal] = {}

    def add(kind, payload, ways, times=1):
        if ways > 1:
            wire = payload * (ways - 1) / ways * (2 if kind == "all-reduce" else 1)
            total = found.setdefault(kind, CollectiveTotal())
            total.payload_bytes += payload * times
            total.wire_bytes += wire * times

    add("all-gather", (2 * held - once) * size, split, accumulation)
    add("reduce-scatter", with_gradients * size, split)
    add("all-reduce", with_gradients / split * size, axis("data"))
    activations = rows / axis("sequence") * config.hidden_size * size
    add("all-reduce", activations, axis("tensor"), 4 * config.num_layers + 2)
    keys_and_values = 2 * rows * config.num_kv_heads * config.head_dim / axis("tensor") * size
    add("all-gather", keys_and_values, axis("sequence"), 2 * config.num_layers)
    add("reduce-scatter", keys_and_values, axis("sequence"), config.num_layers)
    return found
