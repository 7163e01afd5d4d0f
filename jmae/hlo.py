"""The cost of a compiled program, read from XLA's text: its kernels, FLOPs, memory traffic and network traffic.

XLA's own cost analysis counts the body of a loop once, ignores the network, and does not exist for GPUs. This module
counts the body of a loop as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Operations that move no data themselves.
FREE = """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id
    opt-barrier domain""".split()
# Custom calls that only give the compiler information. They launch nothing.
NO_CALL = """Sharding SPMDFullToShardShape SPMDShardToFullShape AllocateBuffer annotate_device_placement""".split()
BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


class Operation(NamedTuple):
    """One line of XLA's text."""

    name: str
    kind: str  # XLA's name for the kind of operation
    type: str  # type of the result: element types, shapes and layouts
    operands: tuple[str, ...]  # names of other operations of the same computation
    rest: str  # attributes
    root: bool  # whether its result is the result of the computation


class Work(NamedTuple):
    """FLOPs of matrix products and convolutions, by the type of their inputs. A multiply-add is two FLOPs."""

    low: float = 0.0  # inputs of fewer than four bytes a number: bfloat16, float16
    float32: float = 0.0


class Kernel(NamedTuple):
    """An operation that a device launches."""

    name: str
    kind: str  # XLA's name for the kind of operation
    target: str  # the function that a custom call names; "" for other operations
    times: int  # number of runs in one step
    bytes: float  # bytes that one run reads and writes
    work: Work  # FLOPs of one run
    padding: bool  # whether it only pads its input to a longer array


class Collective(NamedTuple):
    """All collective operations of one step that have the same kind and group."""

    kind: str
    group: tuple[int, ...]  # devices of the first group
    times: int  # number of runs in one step
    size: float  # bytes of the whole arrays that are reduced, gathered, scattered or sent
    sent: float  # least number of bytes that a device sends (in a ring)


class Program:
    """A program that XLA compiled for `devices` devices, read from its text.

    Attributes:
        parts: the operations of each computation, by its name.
        entry: name of the computation that starts the program.
        run: (computation, operation, number of runs in one step) of all operations that run.
        unknown: number of loops of unknown length; their bodies count once.
    """

    def __init__(self, text: str, devices: int):
        self.devices, self.unknown = devices, 0
        self.parts, self.entry = parse(text)
        self.ops = {part: {op.name: op for op in ops} for part, ops in self.parts.items()}
        self.users: dict[str, dict[str, list[Operation]]] = {part: {} for part in self.parts}
        for part, ops in self.parts.items():
            for op in ops:
                for operand in dict.fromkeys(op.operands):
                    self.users[part].setdefault(operand, []).append(op)
        self.run = list(self._executed(self.entry, 1))

    def _executed(self, part: str, times: int) -> Iterator[tuple[str, Operation, int]]:
        """(computation, operation, number of runs) of each operation; all branches of a condition count."""
        for op in self.parts[part]:
            yield part, op, times
            called = self._called(op)
            if op.kind == "while":
                for name in called:
                    yield from self._executed(name, times * self._trips(part, op))
            elif op.kind in ("conditional", "call", "async-start"):
                for name in called:
                    yield from self._executed(name, times)

    def _called(self, op: Operation) -> list[str]:
        """The names of the computations that an operation calls."""
        if op.kind == "while":
            return re.findall(r"body=%?([\w.\-]+)", op.rest)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", op.rest):
            return re.findall(r"[\w.\-]+", branches[1])
        return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", op.rest)

    def _trips(self, part: str, op: Operation) -> int:
        """The number of iterations of a loop: XLA's own number, or the constant limit of its counter.

        Counts the loop in `unknown` and returns 1 where neither is known.
        """
        if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', op.rest):
            return int(known[1])
        (name,) = re.findall(r"condition=%?([\w.\-]+)", op.rest)
        condition = self.ops[name]
        last = next(each for each in self.parts[name] if each.root)
        counter, limit = (condition.get(each) for each in (*last.operands, "", "")[:2])
        if last.kind == "compare" and "direction=LT" in last.rest and counter and limit and limit.kind == "constant":
            number = re.search(r"index=(\d+)", counter.rest)
            state = self.ops[part].get(op.operands[0])
            if number and state and state.kind == "tuple":
                start = self.ops[part][state.operands[int(number[1])]]
                return int(limit.rest.split(")")[0]) - (
                    int(start.rest.split(")")[0]) if start.kind == "constant" else 0
                )
        self.unknown += 1
        return 1

    # --- network ------------------------------------------------------------------------------------------------------

    def collectives(self) -> list[Collective]:
        """The collective operations of one step, summed by kind and group; groups of one device are left out."""
        found: dict[tuple[str, tuple[int, ...]], list[float]] = {}
        channels: set[str] = set()
        for part, op, times in self.run:
            for where, each in self._within(part, op):
                kind = each.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # TPU: an asynchronous collective stands in several fused operations, with the same channel.
                if channel := re.search(r"channel_id=\d+", each.rest):
                    if channel[0] in channels:
                        continue
                    channels.add(channel[0])
                # TPU: a fusion of an all-reduce and a slice is a reduce-scatter.
                if where != part and kind == "all-reduce" and "reduce-scatter" in where + op.name:
                    kind = "reduce-scatter"
                group = self._group(each)
                n, operands = len(group), sum(size(self.ops[where][name].type) for name in each.operands)
                if n == 1:
                    continue
                whole = operands * n if kind == "all-gather" else operands
                share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
                total = found.setdefault((kind, group), [0, 0, 0])
                for i, more in enumerate((1, whole, share.get(kind, (n - 1) / n) * whole)):
                    total[i] += times * more
        return [Collective(kind, group, int(n), whole, sent) for (kind, group), (n, whole, sent) in found.items()]

    def _within(self, part: str, op: Operation) -> Iterator[tuple[str, Operation]]:
        """(computation, operation) of the operation itself, or of each operation inside a fused one."""
        if op.kind != "fusion":
            yield part, op
        for name in self._called(op) if op.kind == "fusion" else ():
            for each in self.parts[name]:
                yield from self._within(name, each)

    def _group(self, op: Operation) -> tuple[int, ...]:
        """The devices of the first group."""
        if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest):
            return tuple(sorted({int(pairs[1]), int(pairs[2])}))
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest):
            return tuple(int(i) for i in listed[1].split(","))
        if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", op.rest):
            shape = [int(i) for i in iota[1].split(",")]
            return tuple(_numbers(iota[2]).reshape(shape)[0].tolist())
        if in_mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", op.rest):
            # 'a':(2)4 is a part of the axis 'a': 4 devices, inside parts of 2.
            axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", in_mesh[1])}
            chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", in_mesh[3])
            parts = {name: (int(before or 1), int(n or axes[name])) for name, before, n in chosen}
            dims = [each for name, n in axes.items() for each in _thirds(n, *parts.get(name, (n, 1)))]
            middle = [3 * list(axes).index(name) + 1 for name, _, _ in chosen]
            numbers = _numbers(in_mesh[2] or f"[{math.prod(dims)}]").reshape(dims)
            order = [i for i in range(len(dims)) if i not in middle] + middle
            return tuple(numbers.transpose(order).reshape(-1, math.prod(dims[i] for i in middle))[0].tolist())
        if re.search(r"replica_groups=\{\}", op.rest) or "replica_groups" not in op.rest:
            return tuple(range(self.devices))
        raise ValueError(f"replica_groups have an unknown form: {op.rest[:200]}")

    # --- kernels ------------------------------------------------------------------------------------------------------

    def kernels(self) -> list[Kernel]:
        """The operations that a device launches. Each is listed once, with its number of runs.

        Loops, tuples, bitcasts, the end of an asynchronous operation and the compiler's own markers launch nothing. All
        branches of a condition are listed, although only one of them runs.
        """
        return [
            Kernel(
                op.name,
                op.kind,
                call_target(op),
                times,
                self._moved(part, op),
                self._work(part, op),
                self._pads(part, op),
            )
            for part, op, times in self.run
            if self._launches(op)
        ]

    def launches(self) -> int:
        """The number of kernels that one step launches."""
        return sum(times for _, op, times in self.run if self._launches(op))

    def custom_calls(self) -> Counter[str]:
        """The number of calls in one step of each library function (cuDNN, cuBLAS, Triton), by its name in XLA."""
        calls: Counter[str] = Counter()
        for _, op, times in self.run:
            if op.kind == "custom-call" and self._launches(op):
                calls[call_target(op)] += times
        return calls

    def work(self) -> Work:
        """FLOPs of one step on a device, from matrix products, convolutions and cuDNN's attention.

        Fused products and library calls count too. Attention counts 4 b h n m d forward and 10 b h n m d backward. Here
        b is the batch, h heads, n queries, m keys and d the width of a head. Products inside a hand-written kernel
        (Pallas, Triton) do not count.
        """
        each = [(times, self._work(part, op)) for part, op, times in self.run]
        return Work(sum(n * work.low for n, work in each), sum(n * work.float32 for n, work in each))

    def padding(self) -> float:
        """Bytes read and written by kernels that only make an array longer."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels() if kernel.padding)

    def seconds(self, low: float, float32: float, bandwidth: float) -> float:
        """Seconds of one step whose kernels run one after the other.

        A kernel takes the time of its FLOPs or the time of its bytes, whichever is longer. The rates are `low` and
        `float32` FLOP/s, by the type of its inputs, and `bandwidth` bytes/s.
        """
        return sum(
            kernel.times * max(kernel.work.low / low + kernel.work.float32 / float32, kernel.bytes / bandwidth)
            for kernel in self.kernels()
        )

    def _launches(self, op: Operation) -> bool:
        if op.kind in FREE or op.kind.endswith("-done") or op.kind == "async-start":
            return False
        return call_target(op) not in NO_CALL

    def _work(self, part: str, op: Operation) -> Work:
        """FLOPs of one run of an operation, or of all operations inside a fused one."""
        if op.kind not in ("fusion", "dot", "convolution", "custom-call"):
            return Work()
        low = float32 = 0.0
        for where, each in self._within(part, op):
            types = [self.ops[where][name].type for name in each.operands]
            if flops := flops_of(each, types):
                small = size_of_number(types[0]) < 4
                low, float32 = low + flops * small, float32 + flops * (not small)
        return Work(low, float32)

    def _pads(self, part: str, op: Operation) -> bool:
        """Whether an operation, or one result of a fused operation, is a pad (perhaps with a conversion of type)."""
        if op.kind in ("bitcast", "convert"):
            return self._pads(part, self.ops[part][op.operands[0]])
        if op.kind == "tuple":
            return any(self._pads(part, self.ops[part][name]) for name in op.operands)
        if op.kind == "fusion":
            (inner,) = self._called(op)
            return self._pads(inner, next(each for each in self.parts[inner] if each.root))
        return op.kind == "pad"

    # --- memory -------------------------------------------------------------------------------------------------------

    def traffic(self) -> float:
        """Bytes that one step reads from and writes to the main memory of a device.

        An operation reads its operands and writes its result; a fused operation counts as one. A slice counts only the
        bytes of the slice. Arrays in another memory, such as a TPU's VMEM, do not count.
        """
        return sum(times * self._moved(part, op) for part, op, times in self.run)

    def _moved(self, part: str, op: Operation) -> float:
        """Bytes that one run of an operation reads and writes (`traffic`)."""
        if not self._launches(op):
            return 0
        inputs = [size(self.ops[part][name].type, main=True) for name in op.operands]
        if op.kind in ("dynamic-slice", "gather"):
            return size(op.type, main=True) * 2
        if op.kind == "dynamic-update-slice":
            return 2 * inputs[1]
        if op.kind == "copy-start":  # type: (to, from, state)
            return sum(size(each, main=True) for each in elements(op.type)[:2])
        if op.kind.endswith("-start"):
            return 2 * sum(inputs)
        if call_target(op).startswith(("__cublas", "__cudnn")):  # the workspace, an array of bytes, does not count
            return sum(inputs) + sum(size(each) for each in elements(op.type) if not each.startswith(("s8", "u8")))
        if op.kind != "fusion":
            return sum(inputs) + size(op.type, main=True)
        (inner,) = self._called(op)
        parameters = {int(each.rest.split(")")[0]): each.name for each in self.parts[inner] if each.kind == "parameter"}
        reads = sum(min(most, self._read(inner, parameters[i])) for i, most in enumerate(inputs))
        return reads + min(size(op.type, main=True), self._written(inner))

    def _read(self, part: str, name: str) -> float:
        """Bytes of a value that a fused operation reads; only the slices count where the value is only sliced."""
        most, total = size(self.ops[part][name].type), 0.0
        for user in self.users[part].get(name, []):
            if user.kind in ("dynamic-slice", "gather") and user.operands[0] == name:
                total += size(user.type)
            elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.kind == "bitcast":
                total += self._read(part, user.name)
            elif user.kind == "fusion":
                (inner,) = self._called(user)
                number = user.operands.index(name)
                total += next(
                    self._read(inner, each.name)
                    for each in self.parts[inner]
                    if each.kind == "parameter" and int(each.rest.split(")")[0]) == number
                )
            else:
                return most
        return min(most, total)

    def _written(self, part: str, name: str = "") -> float:
        """Bytes that a fused operation writes; only the slice counts where an array is updated in place."""
        op = self.ops[part][name] if name else next(op for op in self.parts[part] if op.root)
        if op.kind == "tuple":
            return sum(self._written(part, each) for each in op.operands)
        if op.kind == "bitcast":
            return self._written(part, op.operands[0])
        if op.kind == "dynamic-update-slice":
            return size(self.ops[part][op.operands[1]].type)
        if op.kind == "fusion":
            return self._written(self._called(op)[0])
        return size(op.type)


# --- FLOPs of one operation -------------------------------------------------------------------------------------------


def flops_of(op: Operation, types: list[str]) -> float:
    """FLOPs of a matrix product or convolution, also as a library call; 0 for other operations.

    `types` has the types of the operands. Raises ValueError where the attributes have an unknown form.
    """
    target = call_target(op)
    if op.kind == "dot" or target.startswith("__cublas"):
        found = re.search(r'lhs_contracting_dim(?:s=|ensions":)[{\[]([\d,"]*)[}\]]', op.rest)
        if not found:
            raise ValueError(f"a product has an unknown form: {op.rest[:200]}")
        lengths = shape_of(types[0])
        depth = math.prod(lengths[int(axis)] for axis in found[1].replace('"', "").split(",") if axis)
        return 2 * math.prod(shape_of(op.type)) * depth
    if target.startswith("__cudnn$fmha"):
        scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', op.rest)
        if not scores:
            raise ValueError(f"an attention has an unknown form: {op.rest[:200]}")
        n = math.prod(int(length) for length in scores[1].replace('"', "").split(","))
        return (10 if "Backward" in target else 4) * n * shape_of(types[0])[-1]
    if op.kind != "convolution" and not target.startswith("__cudnn$conv"):
        return 0
    # The labels of a cuDNN call that computes a gradient are those of the forward convolution.
    x, kernel, out = types[0], types[1], op.type
    if "BackwardInput" in target:
        out = x
    elif "BackwardFilter" in target:
        kernel, out = op.type, types[1]
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", op.rest)
    if not labels:
        raise ValueError(f"a convolution has an unknown form: {op.rest[:200]}")
    lengths = shape_of(kernel)
    each = math.prod(lengths) / lengths[labels[1].index("o")]  # multiply-adds for one number of the result
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    dilation = re.search(r"lhs_dilate=([\dx]+)", op.rest)  # zeros between the inputs cause no work
    less = math.prod(map(int, dilation[1].split("x"))) if dilation else 1
    return 2 * math.prod(shape_of(out)) * each / (int(groups[1]) if groups else 1) / less


def call_target(op: Operation) -> str:
    """The function that a custom call names; "" for other operations."""
    if op.kind != "custom-call":
        return ""
    found = re.search(r'custom_call_target="([^"]*)"', op.rest)
    return found[1] if found else ""


def shape_of(type_: str) -> list[int]:
    """The shape of the first array of a type. Raises ValueError where the type has no array."""
    found = ARRAY.search(type_)
    if not found:
        raise ValueError(f"the type has no array: {type_}")
    return [int(n.strip("<=")) for n in found[2].split(",") if n]


def size_of_number(type_: str) -> float:
    """Bytes of one number of the first array of a type."""
    return size(f"{type_.strip('(').partition('[')[0]}[]")


def _numbers(text: str) -> np.ndarray:
    """The flat device numbers of "0,2,1,3" or of "[2,2]T(1,0)", which is 0, 1, ... in this shape, transposed."""
    if not text.startswith("["):
        return np.array([int(i) for i in text.split(",")])
    dims, _, order = (part.strip("[]()") for part in text.partition("T"))
    axes = [int(n) for n in dims.split(",")]
    transposed = [int(i) for i in order.split(",")] if order else None
    return np.arange(math.prod(axes)).reshape(axes).transpose(transposed).reshape(-1)


def _thirds(n: int, before: int, middle: int) -> tuple[int, int, int]:
    return before, middle, n // before // middle


def parse(text: str) -> tuple[dict[str, list[Operation]], str]:
    """(the operations of each computation, name of the entry computation) of XLA's text.

    Raises ValueError without an entry computation.
    """
    parts: dict[str, list[Operation]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = header[2]
            parts[current] = []
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            root, name, body = found.groups()
            end = closing(body, 0) if body.startswith("(") else body.index(" ")
            type_, call = body[:end].strip(), body[end:].strip()
            kind, _, _ = call.partition("(")
            stop = closing(call, len(kind))
            inside = call[len(kind) + 1 : stop - 1]
            operands = () if kind in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = call[len(kind) + 1 :] if kind in ("parameter", "constant") else call[stop:]
            parts[current].append(Operation(name, kind, type_, operands, rest, bool(root)))
    if not entry:
        raise ValueError("XLA's text has no entry computation")
    return parts, entry


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the bracket at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i + 1
    raise ValueError(f"a bracket is never closed: {text[start : start + 200]}")


def elements(type_: str) -> list[str]:
    """The arrays of a type."""
    return [found[0] for found in ARRAY.finditer(type_)]


def size(type_: str, *, main: bool = False) -> float:
    """Bytes of all arrays of a type; with `main` only of those in the device's main memory."""
    total = 0.0
    for kind, shape, layout in ARRAY.findall(type_):
        if main and re.search(r"S\([1-9]", layout):
            continue
        bits = BITS[kind] if kind in BITS else int(re.findall(r"\d+", kind)[0])
        total += bits / 8 * math.prod(int(n.strip("<=")) for n in shape.split(",") if n)
    return total
