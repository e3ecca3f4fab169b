"""What the devices of each layout exchange in a compiled step: all that the layout implies, and nothing else.

The model computes in float32, keeps nothing for the backward pass, and sees more tokens than any parameter has
elements, so that no activation can be taken for a parameter.
"""

import collections
import dataclasses
import functools
import math

import jax
import pytest

from qwen_jax.batch_spec import token_columns
from qwen_jax.models.build import parameter_count
from qwen_jax.models.transformer import Qwen
from qwen_jax.programs.account import account
from qwen_jax.programs.hlo import COLLECTIVES, Program, array_shapes, group_size
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.program import compile_run, memory_per_device
from tests.fakes import small_model

BATCH, LENGTH = 64, 32
MODEL = small_model(num_layers=3, num_kv_heads=2, remat="full")
PARAMETERS = parameter_count(MODEL)
# Kernels of one block: queries, keys and values, output, SwiGLU; and the embedding, as large as the output projection.
BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
EMBEDDING = 64 * 32
# Arrays of a collective with fewer elements than this are scalars, norms, biases and the tokens at shard boundaries.
SMALL = 500

Exchange = collections.namedtuple("Exchange", "kind dtype shape group times")


@functools.cache
def compiled(accumulation=1, packed=False, remat="full", **layout):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **layout}), jax.devices()[: math.prod(layout.values())])
    return compile_run(
        Qwen(dataclasses.replace(MODEL, remat=remat)),
        next_token_prediction(),
        OptimizerConfig(1e-3),
        10,
        mesh,
        batch_size=BATCH,
        columns=token_columns(LENGTH, packed),
        accumulation=accumulation,
    )


def exchanges(program):
    """Every array of every collective of the program, with how many devices a group has and how often it runs."""
    hlo = Program(program.as_text())
    found = []
    for name, times in account(hlo).times.items():
        for instruction in hlo.computations[name].instructions:
            if instruction.kind in COLLECTIVES:
                found += [
                    Exchange(instruction.kind, dtype, tuple(shape), group_size(instruction, hlo.partitions), times)
                    for dtype, shape in array_shapes(instruction.shape)
                ]
    return found


def large(program):
    return [exchange for exchange in exchanges(program) if math.prod(exchange.shape) >= SMALL]


def elements(found, kind, group=None):
    return sum(
        math.prod(exchange.shape) * exchange.times
        for exchange in found
        if exchange.kind == kind and group in (None, exchange.group)
    )


@pytest.mark.parametrize(
    "remat", ["minimal", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("dots", "qkv", "attention"))]
)
def test_no_remat_policy_keeps_gathered_parameters(remat):
    """They are gathered again, or the model would be held whole. "none" keeps them all, and "weights" some."""
    found = large(compiled(fsdp=8, remat=remat))
    assert elements(found, "all-gather") == 2 * 3 * BLOCK + 2 * EMBEDDING


def test_weights_of_gate_and_up_that_are_kept_are_gathered_once():
    found = large(compiled(fsdp=8, remat="weights"))
    assert elements(found, "all-gather") == 3 * (2 * BLOCK - 2 * 32 * 48) + 2 * EMBEDDING


@pytest.mark.parametrize("accumulation", [1, 4])
def test_replicas_exchange_each_gradient_once_per_step(accumulation):
    found = exchanges(compiled(accumulation, data=8))
    assert {exchange.kind for exchange in found} == {"all-reduce"}
    assert PARAMETERS <= elements(found, "all-reduce") <= 1.01 * PARAMETERS


def test_sharded_parameters_are_gathered_for_either_pass_and_gradients_are_reduced_once():
    program = compiled(fsdp=8)
    found = large(program)
    assert {exchange.kind for exchange in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert elements(found, "all-gather") == 2 * 3 * BLOCK + 2 * EMBEDDING
    reduced = elements(found, "all-reduce") + 8 * elements(found, "reduce-scatter")
    assert reduced == 3 * BLOCK + 2 * EMBEDDING
    # Parameters, two moments and the batch lie in eighths, but for norms and biases; counters are small.
    replicated = PARAMETERS - 3 * BLOCK - 2 * EMBEDDING
    held = 12 * ((PARAMETERS - replicated) / 8 + replicated) + 2 * 4 * BATCH * LENGTH / 8
    assert held <= memory_per_device(program)["arguments"] <= held + 1024


def test_gradients_cross_between_replicas_once_and_sharded_whatever_the_accumulation():
    """Within a replica they are reduced in each of two parts; between replicas once, each device its own quarter."""
    found = exchanges(compiled(2, data=2, fsdp=4))
    assert {e.group for e in found if e.kind == "all-gather"} == {4}
    matrices = 3 * BLOCK + 2 * EMBEDDING
    within = elements(found, "all-reduce", 4) + 4 * elements(found, "reduce-scatter", 4)
    assert 2 * matrices <= within <= 2.1 * PARAMETERS
    between = [e for e in found if e.kind == "all-reduce" and e.group == 2]
    replicated = PARAMETERS - matrices
    assert matrices / 4 + replicated <= elements(between, "all-reduce") <= matrices / 4 + 1.1 * replicated
    assert {e.times for e in between} == {1}


def test_tensor_parallelism_sums_activations_and_gathers_nothing():
    found = large(compiled(tensor=2))
    assert {e.kind for e in found} == {"all-reduce"}
    hidden = [e for e in found if math.prod(e.shape) == BATCH * LENGTH * 32]
    # The rest are sums of numbers per token.
    assert {math.prod(e.shape) for e in found if e not in hidden} == {BATCH * LENGTH}
    # Forward: the embedding, and attention and SwiGLU of each block; of them attention's is computed again. Backward:
    # the inputs of each projection into a block (the TPU compiler adds these up first) and of the logits.
    assert sum(e.times for e in hidden) <= 1 + 3 * (2 + 1) + 3 * 5 + 1


def test_split_rows_gather_keys_and_values_and_shift_targets():
    found = exchanges(compiled(fsdp=2, sequence=4))
    assert not any(exchange.kind == "all-to-all" for exchange in found)
    # The next token of a device's last one is the next device's first.
    shifts = [exchange for exchange in found if exchange.kind == "collective-permute"]
    assert {exchange.shape for exchange in shifts} == {(BATCH // 2, 1)}
    kv = [e for e in found if e.kind == "all-gather" and e.group == 4]
    # Two heads of keys and of values, for the forward pass, its repetition and the backward pass.
    assert {math.prod(e.shape) for e in kv} == {BATCH // 2 * 2 * LENGTH * 8}
    assert 3 * 2 * 2 <= sum(e.times for e in kv) <= 3 * 2 * 3
    parameters = [e for e in found if e.kind == "all-gather" and e.group == 8]
    assert elements(parameters, "all-gather") == 2 * 3 * BLOCK + 2 * EMBEDDING


def test_all_axes_together_gather_no_hidden_states_and_no_more_than_they_must():
    found = large(compiled(data=2, tensor=2, sequence=2, packed=True))
    hidden = BATCH // 2 * LENGTH * 32
    gathered = [e for e in found if e.kind == "all-gather"]
    assert not any(e.kind == "all-to-all" for e in found)
    assert max(math.prod(e.shape) for e in gathered) < hidden
    assert {e.group for e in gathered} == {2}
