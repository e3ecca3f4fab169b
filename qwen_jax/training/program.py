"""The compiled train step of a run, and what it asks of each device: memory, operations, collectives."""

import dataclasses
import math
import re
from collections import defaultdict

import jax
from jax.sharding import Mesh

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.kernels import resolve_kernel
from qwen_jax.models.transformer import Qwen, parameter_count
from qwen_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from qwen_jax.training.state import abstract_state
from qwen_jax.training.step import batch_shapes, compile_train_step, make_train_step

_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def compile_run(
    model: Qwen, objective, optimizer: OptimizerConfig, train_steps: int, mesh: Mesh, *, batch_size: int,
    sequence_length: int, accumulation: int = 1, seed: int = 0, columns: tuple[str, ...] = (),
    compiler_options: dict | None = None,
) -> jax.stages.Compiled:
    """Compiles the train step of a run from shapes alone, for the devices of `mesh`, whether they exist here or not.

    This is what `Trainer` runs and what `tools/compile_for_tpu.py` measures.

    Args:
      compiler_options: XLA's, by name; those of `gin/hardware/`.

    Raises:
      ValueError: batch, model or mesh do not divide, or the model asks for an attention kernel that cannot run.
    """
    resolve_kernel(model.config, sequence_length, mesh, packed="segment_ids" in columns)
    schedule, transform = learning_rate_schedule(optimizer, train_steps), make_optimizer(optimizer, train_steps)
    shapes = batch_shapes(mesh, batch_size, sequence_length, accumulation, columns)
    step = make_train_step(model, transform, objective, schedule, seed=seed, accumulation=accumulation)
    return compile_train_step(step, abstract_state(model, transform, mesh), shapes, mesh, compiler_options)


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


def collectives_per_device(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives that one device takes part in during one step, loops counted as often as they run.

    Args:
      hlo: text of the compiled program.

    Returns:
      kind to {"count", "bytes"}; bytes are those of the whole (gathered, or summed) array.
    """
    instructions, calls, constants, entry = _parse(hlo)
    times: dict[str, int] = defaultdict(int)

    def visit(computation, factor):
        times[computation] += factor
        for callee, trips, condition in calls[computation]:
            # The TPU compiler does not write how often a loop runs; ours count from 0 to a constant of the condition.
            visit(callee, factor * (trips or max(constants[condition], default=1)))

    visit(entry, 1)
    # One that is fused into compute stands in the start, in each step and in the end of the fusion, on one channel.
    once: dict[tuple, tuple[int, int]] = {}
    for computation, found in instructions.items():
        for kind, size, channel in found:
            once[kind, channel] = max(once.get((kind, channel), (0, 0)), (times[computation], size))
    totals: dict[str, dict[str, int]] = {}
    for (kind, _), (count, size) in once.items():
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += count
        total["bytes"] += count * size
    return {kind: total for kind, total in totals.items() if total["count"]}


def _parse(hlo: str):
    """The program's computations by name.

    Returns:
      (collectives of each: (kind, bytes, channel); calls of each: (callee, times or None, condition of the loop);
      integer constants of each; name of the entry computation).
    """
    instructions, calls, constants = defaultdict(list), defaultdict(list), defaultdict(list)
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            entry = current if header[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        shape, op = instruction.groups()
        kind = op.removesuffix("-start")
        if kind in _COLLECTIVES:
            channel = _CHANNEL.search(line)
            name = channel[1] if channel else f"{current}/{len(instructions[current])}"
            instructions[current].append((kind, _result_bytes(op, shape), name))
        constants[current] += [int(value) for value in _CONSTANT.findall(line)]
        condition, known = _CONDITION.search(line), _TRIPS.search(line)
        trips = 1 if op != "while" else int(known[1]) if known else None
        for callee in _CALLS.findall(line):
            calls[current].append((callee, trips, condition[1] if condition else ""))
    return instructions, calls, constants, entry


def _result_bytes(op: str, shape: str) -> int:
    """Bytes of what a collective gives; several arrays may be combined in one."""
    arrays = [(_BITS.get(dtype, 32), [int(n) for n in dims.split(",") if n]) for dtype, dims in _SHAPE.findall(shape)]
    sizes = [math.prod(dims) * bits // 8 for bits, dims in arrays]
    # The start of an asynchronous gather or permutation lists its operands first.
    return sum(sizes[len(sizes) // 2 :] if op in ("all-gather-start", "collective-permute-start") else sizes)
