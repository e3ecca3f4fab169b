"""Cost of one instruction of a compiled program: operations of products and attention kernels, memory traffic."""

import dataclasses
import math
import re

from qwen_jax.programs.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Program,
    array_shapes,
    hbm_shape_bytes,
    matched,
    shape_bytes,
    tuple_elements,
)

# Operations without a cost: they name, group or wait.
FREE = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "copy-done",
    "slice-done",
    "call-done",
    "call-start",
    "opt-barrier",
    "optimization-barrier",
)


def product_flops(instruction: Instruction) -> int:
    """Operations of a dot or convolution (the TPU compiler's form of a matrix product), 2 per multiply-add.

    For a convolution, only window positions on the input count.
    """
    out = array_shapes(instruction.shape)[0][1]
    left, right = (_operand_dims(instruction, index) for index in (0, 1))
    attributes = instruction.attributes
    if instruction.op == "dot":
        contracted = matched(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    left_labels, right_labels, out_labels = matched(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = _Window.of(attributes, sum(label.isdigit() for label in right_labels))
    positions = math.prod(
        window.positions(
            d,
            *(
                dims[labels.index(str(d))]
                for dims, labels in ((left, left_labels), (right, right_labels), (out, out_labels))
            ),
        )
        for d in range(len(window.stride))
    )
    features, batches = (
        int(found[1]) if (found := re.search(rf"{kind}_group_count=(\d+)", attributes)) else 1
        for kind in ("feature", "batch")
    )
    depth = left[left_labels.index("f")] // features
    return 2 * depth * out[out_labels.index("f")] * (left[left_labels.index("b")] // batches) * positions


def _operand_dims(product: Instruction, index: int) -> list[int]:
    operand = product.operand(index)
    assert operand is not None  # a product reads results of its own computation
    return array_shapes(operand.shape)[0][1]


@dataclasses.dataclass
class _Window:
    """The window of a convolution: stride, dilations and padding of each spatial dimension."""

    stride: list[int]
    left_dilation: list[int]
    right_dilation: list[int]
    padding: list[tuple[int, int]]

    @classmethod
    def of(cls, attributes: str, dimensions: int) -> "_Window":
        found = re.search(r"window=\{([^}]*)\}", attributes)
        parts = dict(part.split("=") for part in found[1].split()) if found else {}

        def numbers(key):
            return [int(n) for n in parts[key].split("x")] if key in parts else [1] * dimensions

        padding = [(0, 0)] * dimensions
        if "pad" in parts:
            padding = [(int(low), int(high)) for low, high in re.findall(r"(-?\d+)_(-?\d+)", parts["pad"])]
        return cls(numbers("stride"), numbers("lhs_dilate"), numbers("rhs_dilate"), padding)

    def positions(self, d: int, left: int, right: int, out: int) -> int:
        """Pairs of an output position and a window element that meet an element of the input, along dimension d."""
        dilation, stride = self.left_dilation[d], self.stride[d]
        if right == 1 and dilation == 1 and self.padding[d] == (0, 0):
            return out
        count, span = 0, (left - 1) * dilation + 1
        for k in range(right):
            base = k * self.right_dilation[d] - self.padding[d][0]
            if dilation == 1:  # o * stride + base lies in [0, left)
                low, high = max(0, math.ceil(-base / stride)), min(out - 1, (left - 1 - base) // stride)
                count += max(0, high - low + 1)
            else:
                places = (o * stride + base for o in range(out))
                count += sum(1 for place in places if 0 <= place < span and place % dilation == 0)
        return count


def hbm_bytes(instruction: Instruction, program: Program) -> float:
    """Main-memory traffic of one instruction: operands and results.

    A slice of a large operand counts as the slice, and an update in place counts as the update. A value in on-chip
    memory (its layout names a memory space) does not count.
    """
    operands = [instruction.operand(k) for k in range(len(instruction.operands))]
    if instruction.op == "fusion" and (fused := program.called(instruction)) is not None:
        parameters, total = fused.parameters(), 0.0
        for k, operand in enumerate(operands):
            if operand is not None and k in parameters and (size := hbm_shape_bytes(operand.shape)):
                total += min(_read(fused, parameters[k].name, program), size)
        for k, element in enumerate(tuple_elements(instruction.shape)):
            if size := hbm_shape_bytes(element):
                written = _written(fused.root, program, k)
                total += size if written is None else min(written, size)
        return total
    if instruction.op in ("copy-start", "slice-start"):  # prefetched while something else computes
        return 0
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * hbm_shape_bytes(instruction.shape)
    if instruction.op == "dynamic-update-slice":
        return 2 * (hbm_shape_bytes(operands[1].shape) if operands[1] is not None else 0)
    return sum(hbm_shape_bytes(o.shape) for o in operands if o is not None) + hbm_shape_bytes(instruction.shape)


def _read(computation: Computation, name: str, program: Program) -> float:
    """Bytes of value `name` that a fused computation reads; infinity means the whole value."""
    total = 0.0
    for user in computation.instructions:
        if name not in user.operands:
            continue
        if user.op in ("bitcast", "get-tuple-element") or (user.op == "copy" and not user.is_root):
            if user is computation.root:
                return math.inf
            total += _read(computation, user.name, program)
        elif user.op in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            total += shape_bytes(user.shape)
        elif (
            (user.op == "dynamic-update-slice" and user.operands[0] == name)
            or user.op in ("tuple", "custom-call")
            or user.op in COLLECTIVES
        ):
            continue  # updated in place, handed through, or moved by a collective
        elif user.op == "fusion" and (inner := program.called(user)) is not None:
            parameters = inner.parameters()
            places = [k for k, operand in enumerate(user.operands) if operand == name and k in parameters]
            if user is not computation.root and _only_copied(inner) in [parameters[k] for k in places]:
                total += _read(computation, user.name, program)
                continue
            total += sum(_read(inner, parameters[k].name, program) for k in places)
        else:
            return math.inf
    return total


def _only_copied(fused: Computation) -> Instruction | None:
    """The parameter that a fused computation returns with at most another layout, or None.

    Another fusion around it does not make this copy as a whole; it reads only the elements that it uses.
    """
    result = fused.root
    while result is not None and result.op in ("copy", "bitcast"):
        result = result.operand(0)
    return result if result is not None and result.op == "parameter" else None


def _written(result: Instruction | None, program: Program, element: int = 0) -> int | None:
    """Bytes written for a result (element of a tuple) of a fused computation; None means the whole result."""
    while result is not None and result.op == "bitcast":
        result = result.operand(0)
    if result is None or result.op in ("parameter", "custom-call") or result.op in COLLECTIVES:
        return 0
    if result.op == "dynamic-update-slice":
        update = result.operand(1)
        return shape_bytes(update.shape) if update is not None else None
    if result.op == "get-tuple-element":
        return _written(result.operand(0), program, result.tuple_index)
    if result.op == "tuple":
        return _written(result.operand(element), program)
    if result.op == "fusion" and (inner := program.called(result)) is not None:
        return _written(inner.root, program, element)
    return None


def attention_flops(kernel: Instruction, separate_dq: bool, causal: bool = True) -> float | None:
    """Operations of an attention kernel, recognized by its name; None for any other kernel.

    The first two operands with at least three dimensions count as queries and keys, [..., length, head_dim].

    Args:
      separate_dq: whether a separate kernel computes the gradient of the queries. Otherwise the kernel for the
        gradient of the keys has five products instead of four.
      causal: whether to count half of the square; skipped blocks do not matter.
    """
    operation = re.search(r'op_name="([^"]*)"', kernel.attributes)
    if not re.search(r"splash|flash|attention|mha", f"{kernel.name} {operation[1] if operation else ''}"):
        return None
    if re.search(r"dkv|bwd_dk", kernel.name):
        products = 4 if separate_dq else 5  # scores, weights' gradient, dv, dk and, where it is not elsewhere, dq
    elif "dq" in kernel.name:
        products = 3  # scores, weights' gradient, dq
    else:
        products = 5 if "bwd" in kernel.name else 2
    operands = [kernel.operand(k) for k in range(len(kernel.operands))]
    arrays = [shape for o in operands if o is not None for shape in array_shapes(o.shape)[:1]]
    arrays = [dims for dtype, dims in arrays if dtype in ("bf16", "f32") and len(dims) >= 3]
    if len(arrays) < 2:
        return None
    queries, keys = arrays[:2]
    return products * 2 * math.prod(queries) * keys[-2] * (0.5 if causal else 1.0)


def _cudnn_attention_flops(call: Instruction) -> float | None:
    """Operations of cuDNN's attention, half of the square if it is causal; None of any other call."""
    if (target := re.search(r'custom_call_target="__cudnn\$fmha(\w*)"', call.attributes)) is None:
        return None
    # As JAX hands them over, [batch, length, heads, head_dim], whatever order their dimensions have in memory.
    (_, queries), (_, keys) = array_shapes(matched(r"operand_layout_constraints=\{(.*?\})\}", call.attributes)[1])[:2]
    products = 5 if target[1].endswith("Backward") else 2
    causal = re.search(r'"mask_type": ?"CAUSAL"', call.attributes)
    return products * 2 * math.prod(queries) * keys[1] * (0.5 if causal else 1.0)


def kernel_flops(kernel: Instruction, separate_dq: bool) -> float | None:
    """Operations of a hand-written kernel: of attention by its shapes, of others as they declare; None if unknown."""
    if (flops := _cudnn_attention_flops(kernel)) is not None:
        return flops
    if 'custom_call_target="tpu_custom_call"' in kernel.attributes:
        if (flops := attention_flops(kernel, separate_dq)) is not None:
            return flops
    declared = re.search(r'"cost_estimate":\{"flops":"(\d+)"', kernel.attributes)
    return float(declared[1]) if declared else None
