"""Totals of one device for one run of a compiled program; a loop body counts once per iteration."""

import dataclasses
import re

from qwen_jax.programs.costs import FREE, hbm_bytes, kernel_flops, product_flops
from qwen_jax.programs.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Program,
    Value,
    group_size,
    loop_constants,
    matched,
    shape_bytes,
    trip_count,
    unchanged,
)

# Custom calls for bookkeeping by the compiler: they compute nothing.
_BOOKKEEPING = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
    "SliceId",
    "ZeroCrop",
)


@dataclasses.dataclass
class CollectiveTotal:
    """Totals of the collectives of one kind on one device.

    Attributes:
      count: number of collectives.
      payload_bytes: size of the whole array that is gathered or summed.
      wire_bytes: bytes that a device sends in a ring of n: payload x (n - 1) / n, twice that for an all-reduce.
      synchronous_wire_bytes: the part of `wire_bytes` that the schedule does not overlap with compute.
    """

    count: int = 0
    payload_bytes: float = 0
    wire_bytes: float = 0
    synchronous_wire_bytes: float = 0


@dataclasses.dataclass
class KernelTotal:
    """Calls of one hand-written kernel or library routine; `flops` is None where it is unknown."""

    target: str
    calls: int = 0
    flops: float | None = 0.0


@dataclasses.dataclass
class Account:
    """Totals of one device for one run of a program.

    Attributes:
      product_flops: operations of matrix products, 2 per multiply-add.
      kernel_flops: operations of hand-written kernels whose operations are known.
      cycles: sum of the TPU compiler's estimates; 0 for other backends.
      cycles_by_op: the same by kind of instruction.
      steps: (operations, main-memory bytes, number of runs) of each instruction that computes, for a roofline.
      collectives: by kind.
      kernels: by name without its number.
      loops: (name, trips, whether the number is proven).
      times: number of runs of each computation, fused ones excepted.
      warnings: sentences about operations that the totals lack.
    """

    product_flops: float = 0.0
    kernel_flops: float = 0.0
    cycles: int = 0
    cycles_by_op: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)
    collectives: dict[str, CollectiveTotal] = dataclasses.field(default_factory=dict)
    kernels: dict[str, KernelTotal] = dataclasses.field(default_factory=dict)
    loops: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)
    times: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        """All known operations."""
        return self.product_flops + self.kernel_flops

    @property
    def hbm_bytes(self) -> float:
        """Main-memory traffic in bytes, without kernels and collectives."""
        return sum(traffic * times for _, traffic, times in self.steps)


def account(program: Program) -> Account:
    """The `Account` of a compiled program."""
    return _Accountant(program).result


def collectives_per_device(hlo: str) -> dict[str, CollectiveTotal]:
    """The collectives of the program with this text, by kind."""
    return account(Program(hlo)).collectives


class _Accountant:
    """Walks the program from its entry."""

    def __init__(self, program: Program):
        self._program, self.result = program, Account()
        self._seen: set[tuple] = set()
        every = (i for c in program.computations.values() for i in c.instructions)
        self._separate_dq = any(i.op == "custom-call" and "dq" in i.name for i in every)
        self._walk(program.entry, 1, {})

    def _walk(self, computation: Computation, times: int, known: dict[int, Value]):
        """Adds a scheduled computation that runs `times` times; `known`: constants in its parameter tuple."""
        self.result.times[computation.name] = self.result.times.get(computation.name, 0) + times
        for instruction in computation.instructions:
            match instruction.op:
                case "while":
                    self._loop(instruction, times, known)
                case "conditional":
                    branches = self._program.branches(instruction)
                    self.result.warnings.append(f"{instruction.name}: all {len(branches)} branches are counted")
                    for branch in branches:
                        self._walk(branch, times, {})
                case "call":
                    self._walk(self._program.callee(instruction, "to_apply", "calls"), times, {})
                case "call-start":  # TPU v7: collectives handed to the sparse cores
                    self._inside(self._program.called(instruction, "to_apply"), times, True, computation)
                case _:
                    self._step(instruction, times)

    def _loop(self, loop: Instruction, times: int, known: dict[int, Value]):
        trips, proven = trip_count(self._program, loop, known)
        self.result.loops.append((loop.name, trips, proven))
        if not proven:
            self.result.warnings.append(f"{loop.name}: its number of iterations is not proven; assumed {trips}")
        body = self._program.callee(loop, "body")
        self._walk(body, times * trips, unchanged(body, loop_constants(loop, known)))

    def _step(self, instruction: Instruction, times: int):
        result, computation = self.result, instruction.computation
        if cycles := instruction.cycles * times:
            result.cycles += cycles
            result.cycles_by_op[instruction.op] = result.cycles_by_op.get(instruction.op, 0) + cycles
        if instruction.op == "custom-call":
            self._kernel(instruction, times)
            return
        flops = 0.0
        if instruction.op in ("convolution", "dot"):
            flops = product_flops(instruction)
            result.product_flops += flops * times
        elif instruction.op in ("fusion", "async-start"):
            called = self._program.called(instruction)
            flops = self._inside(called, times, instruction.op == "async-start", computation)
        elif instruction.kind in COLLECTIVES:
            self._collective(instruction, times, instruction.op.endswith("-start"), None, computation)
        scattering = instruction.op == "fusion" and (instruction.attribute("calls") or "").startswith(
            "all-reduce-scatter"
        )
        moves = instruction.kind.removesuffix("-done") in COLLECTIVES
        if instruction.op not in FREE and not moves and not scattering:
            result.steps.append((flops, hbm_bytes(instruction, self._program), times))

    def _inside(self, computation: Computation | None, times: int, is_async: bool, parent: Computation) -> float:
        """Adds the products and collectives inside of a fusion; returns the operations of one run of it."""
        if computation is None:
            return 0.0
        flops = 0.0
        for instruction in computation.instructions:
            if instruction.op in ("convolution", "dot"):
                one = product_flops(instruction)
                self.result.product_flops += one * times
                flops += one
            elif instruction.kind in COLLECTIVES:
                scatters = computation.name.startswith("all-reduce-scatter") or (
                    instruction.op.startswith("all-reduce")
                    and any(
                        i.op == "dynamic-slice" and instruction.name in i.operands for i in computation.instructions
                    )
                )
                # In a fusion, an all-reduce with a slice is a synchronous reduce-scatter. Any other collective there is
                # a step of one that is fused into compute, so it overlaps compute.
                self._collective(
                    instruction, times, is_async or not scatters, "reduce-scatter" if scatters else None, parent
                )
            elif instruction.op in ("fusion", "async-start", "call"):
                called = self._program.called(instruction, "calls", "to_apply")
                flops += self._inside(called, times, is_async or instruction.op == "async-start", parent)
        return flops

    def _collective(self, instruction: Instruction, times: int, is_async: bool, kind: str | None, parent: Computation):
        # A collective that is fused into compute appears in the start, in each step and in the end of the fusion, as
        # one chain.
        if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
            key = (parent.name, chain[1], instruction.attribute("channel_id"))
            if key in self._seen:
                return
            self._seen.add(key)
        kind = kind or instruction.kind
        size = group_size(instruction, self._program.partitions)
        operands = [instruction.operand(k) for k in range(len(instruction.operands))]
        payload = sum(shape_bytes(operand.shape) for operand in operands if operand is not None)
        if kind == "all-gather":
            payload *= size
        wire = payload
        if kind != "collective-permute":
            wire = payload * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        total = self.result.collectives.setdefault(kind, CollectiveTotal())
        total.count += times
        total.payload_bytes += payload * times
        total.wire_bytes += wire * times
        if not is_async and not instruction.op.endswith("-start"):
            total.synchronous_wire_bytes += wire * times

    def _kernel(self, call: Instruction, times: int):
        target = matched(r'custom_call_target="([^"]*)"', call.attributes)[1]
        if target in _BOOKKEEPING:
            return
        flops = kernel_flops(call, self._separate_dq)
        name = re.sub(r"(\.\d+|\.clone)+$", "", call.name)
        total = self.result.kernels.setdefault(name, KernelTotal(target))
        total.calls += times
        if flops is None:
            total.flops = None
            self.result.warnings.append(f"kernel {call.name} ({target}), {times} times: its operations are not known")
        else:
            self.result.kernel_flops += flops * times
            total.flops = None if total.flops is None else total.flops + flops * times
