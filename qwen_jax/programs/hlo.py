"""Parser of the text of a compiled XLA program: computations, instructions and iteration counts of loops.

`jax.stages.Compiled.as_text()` returns this text. It is scheduled: a device runs the instructions in this
order. Its syntax is XLA's (https://openxla.org/xla/operation_semantics).
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_DTYPE = r"pred|bf16|c64|c128|[suf]\d+\w*"
_ARRAY = re.compile(rf"\b({_DTYPE})\[([\d,]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(rf"\b(?:{_DTYPE})\[[\d,]*\](\{{[^}}]*\}})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([^\s]+) = ")
_NAMES = re.compile(r"%([\w.\-]+)")
# Values pass through these unchanged.
_TRANSPARENT = ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape", "optimization-barrier")


def matched(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """The first match of a pattern that the text of a whole program contains.

    Raises:
      ValueError: no match.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"expected {getattr(pattern, 'pattern', pattern)} in the text of a program: {text[:80]!r}")
    return found


def array_shapes(shape: str) -> list[tuple[str, list[int]]]:
    """(dtype, dimensions) of each array in a shape, tuples flattened."""
    return [(dtype, [int(n) for n in dims.split(",")] if dims else []) for dtype, dims in _ARRAY.findall(shape)]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape, without padding."""
    total = 0
    for dtype, dims in array_shapes(shape):
        total += math.prod(dims) * _BITS.get(dtype, 8 if dtype.startswith("f8") else 32) // 8
    return total


def hbm_shape_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape in main memory, whose layout names no memory space such as S(1)."""
    found = _ARRAY_WITH_LAYOUT.finditer(shape)
    return sum(shape_bytes(array[0]) for array in found if not re.search(r"S\([1-9]\)", array[1] or ""))


def tuple_elements(shape: str) -> list[str]:
    """Element shapes of a flat tuple; any other shape is its only element."""
    if not shape.startswith("("):
        return [shape]
    return [array[0] for array in _ARRAY_WITH_LAYOUT.finditer(shape)]


@dataclasses.dataclass(eq=False)
class Instruction:
    """One instruction: `name = shape op(arguments), attributes`.

    Attributes:
      operands: names of the instructions of the same computation that it reads.
    """

    name: str
    shape: str
    op: str
    arguments: str
    attributes: str
    is_root: bool
    computation: "Computation"

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAMES.findall(self.arguments)

    def operand(self, index: int) -> "Instruction | None":
        """The instruction that computes operand `index`."""
        return self.computation.by_name.get(self.operands[index])

    @property
    def kind(self) -> str:
        """The operation without the suffix -start of an asynchronous one."""
        return self.op.removesuffix("-start")

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate in clock cycles; 0 where the compiler wrote none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    def attribute(self, key: str) -> str | None:
        """The word after `key=`, such as the name of the computation that a fusion calls."""
        found = re.search(rf"\b{key}=%?([^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def tuple_index(self) -> int:
        """Index of the element that a get-tuple-element takes."""
        return int(matched(r"index=(\d+)", self.attributes)[1])


class Computation:
    """A function of the program: the entry, the body of a loop, the content of a fusion."""

    def __init__(self, name: str, is_entry: bool):
        self.name, self.is_entry = name, is_entry
        self.instructions: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}
        self.root: Instruction | None = None

    def add(self, instruction: Instruction) -> None:
        """Appends an instruction."""
        self.instructions.append(instruction)
        self.by_name[instruction.name] = instruction
        if instruction.is_root:
            self.root = instruction

    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.arguments): i for i in self.instructions if i.op == "parameter" and i.arguments.strip().isdigit()}


class Program:
    """A parsed program.

    Attributes:
      computations: by name.
      entry: the computation that starts the program.
      partitions: number of devices that run it together.
    """

    def __init__(self, text: str):
        """Parses `text`.

        Raises:
          ValueError: the text holds no entry computation.
        """
        self.computations = _parse(text)
        entries = [c for c in self.computations.values() if c.is_entry]
        if not entries:
            raise ValueError("no ENTRY computation: expected the text of a compiled XLA program")
        self.entry = entries[-1]
        header = text.partition("\n")[0]
        counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
        self.partitions = math.prod(counts)

    def called(self, instruction: Instruction, *keys: str) -> Computation | None:
        """The computation that one of the attributes `keys` (default "calls") names."""
        for key in keys or ("calls",):
            if (name := instruction.attribute(key)) in self.computations:
                return self.computations[name]
        return None

    def callee(self, instruction: Instruction, *keys: str) -> Computation:
        """As `called`, for an instruction that always names a computation, such as a loop.

        Raises:
          ValueError: it names none.
        """
        found = self.called(instruction, *keys)
        if found is None:
            raise ValueError(f"{instruction.op} {instruction.name} names no computation of the program")
        return found

    def branches(self, conditional: Instruction) -> list[Computation]:
        """The branches of a conditional, of which one runs."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        names = (
            _NAMES.findall(listed[1])
            if listed
            else [conditional.attribute("true_computation"), conditional.attribute("false_computation")]
        )
        return [self.computations[name] for name in names]


def _parse(text: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    lines: list[str] = []  # of the instruction being read: metadata of kernels breaks it over several

    def finish():
        if current is not None and lines:
            current.add(_instruction(" ".join(lines), current))
            lines.clear()

    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = Computation(header[2], bool(header[1]))
            computations[current.name] = current
        elif current is None:
            continue
        elif line == "}" or line.startswith("}, execution_thread"):
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            lines.append(line)
        elif lines:
            lines.append(line)
    return computations


def _instruction(line: str, computation: Computation) -> Instruction:
    head = matched(_INSTRUCTION, line)
    start = head.end()
    shape_end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", shape_end + 1)
    closing = _closing(line, opening)
    return Instruction(
        head[2],
        line[start:shape_end],
        line[shape_end:opening].strip(),
        line[opening + 1 : closing - 1],
        line[closing:],
        bool(head[1]),
        computation,
    )


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"bracket never closed in {text[start : start + 80]!r}")


@dataclasses.dataclass(frozen=True)
class Value:
    """Source of a scalar: a constant, or element `number` of the parameter tuple of a computation."""

    is_constant: bool
    number: int


def source_of(instruction: Instruction | None, known: dict[int, Value] | None = None) -> Value | None:
    """Follows copies and conversions back to a constant or to an element of the parameter tuple.

    Args:
      known: values of elements of the parameter tuple.
    """
    for _ in range(50):
        if instruction is None:
            return None
        if instruction.op == "constant":
            text = instruction.arguments.strip()
            return Value(True, int(text)) if re.fullmatch(r"-?\d+", text) else None
        if instruction.op in _TRANSPARENT:
            instruction = instruction.operand(0)
        elif instruction.op == "get-tuple-element":
            source, index = instruction.operand(0), instruction.tuple_index
            if source is None:
                return None
            if source.op == "parameter":
                return (known or {}).get(index) or Value(False, index)
            if source.op == "while":  # an element that the loop may leave alone
                source = source.operand(0)
            if source is not None and source.op == "tuple":
                instruction = source.operand(index)
            elif source is not None and source.op == "copy-start":
                instruction = source.operand(0)
            else:
                return None
        else:
            return None
    return None


def loop_constants(loop: Instruction, known: dict[int, Value]) -> dict[int, Value]:
    """Elements of a loop's initial tuple that are constants, by index."""
    initial = loop.operand(0)
    if initial is None or initial.op != "tuple":
        return {}
    found = {i: source_of(initial.operand(i), known) for i in range(len(initial.operands))}
    return {i: value for i, value in found.items() if value and value.is_constant}


def unchanged(body: Computation, values: dict[int, Value]) -> dict[int, Value]:
    """The entries of `values` that the body of a loop passes on unchanged."""
    if body.root is None or body.root.op != "tuple":
        return {}
    return {i: value for i, value in values.items() if source_of(body.root.operand(i)) == Value(False, i)}


def _increment(body: Computation, index: int) -> int | None:
    """Increment that the body of a loop adds to element `index` of its tuple, or None."""
    instruction = body.root.operand(index) if body.root is not None and body.root.op == "tuple" else None
    for _ in range(20):
        if instruction is None:
            return None
        if instruction.op in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            instruction = instruction.operand(0)
        elif instruction.op in ("add", "subtract"):
            for operand in (0, 1):
                value = source_of(instruction.operand(operand))
                if value and value.is_constant:
                    return value.number if instruction.op == "add" else -value.number
            return None
        else:
            return None
    return None


def trip_count(program: Program, loop: Instruction, known: dict[int, Value]) -> tuple[int, bool]:
    """Number of iterations of a while loop.

    Args:
      known: constants among the elements of the parameter tuple of the surrounding computation.

    Returns:
      (count, whether it is proven). XLA writes the count for CPU and GPU; for TPU it is read off the condition, the
      first value and the increment of the counter.
    """
    if written := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(written[1]), True
    condition, body = program.callee(loop, "condition"), program.callee(loop, "body")
    first = loop_constants(loop, known)
    root = condition.root
    if root is None or root.op != "compare":
        return 1, False
    counter, limit = source_of(root.operand(0)), source_of(root.operand(1), first)
    if not counter or not limit or counter.is_constant or not limit.is_constant:
        return 1, False
    start, step = first.get(counter.number), _increment(body, counter.number)
    count = math.ceil((limit.number - (start.number if start else 0)) / (step or 1))
    if "direction=LE" in root.attributes:
        count += 1
    return max(count, 1), start is not None and step is not None


def group_size(instruction: Instruction, partitions: int) -> int:
    """Number of devices in one group of a collective."""
    attributes = instruction.attributes
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'axis_0':(1)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(counted[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    return partitions
