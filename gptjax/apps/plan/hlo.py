"""Read from a program's HLO text what a step moves: bytes through HBM, and bytes between chips.

A loop's body counts as often as it runs. XLA's own cost analysis counts it once, which makes a scanned model look L
times cheaper.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 1, "u4": 1}

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
# Instructions that move no bytes of their own, or whose bytes are counted in the computation that they call.
MOVES_NOTHING = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
MOVES_NOTHING |= {"copy-done", "partition-id", "replica-id", "iota", "opt-barrier", "async-done", "async-update"}
MOVES_NOTHING |= {f"{name}-done" for name in COLLECTIVES}


# Prefix of the computations in which an asynchronous collective, started elsewhere, overlaps with other work.
ASYNC_FUSION = "async_collective_fusion"


class Array(NamedTuple):
    """One array of an instruction's shape; `hbm` is false in on-chip memory, S(1) and above."""

    dtype: str
    bytes: int
    hbm: bool


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    rest: str  # attributes, after the operands; of a constant its value, of a parameter its number
    root: bool


class Collective(NamedTuple):
    """A collective operation of one device.

    Attributes:
        kind: one of COLLECTIVES. An all-reduce and a slice in one fusion, as on TPUs, count as reduce-scatter.
        operand_bytes: size of its operands, each time it runs.
        dtype: data type of the largest operand.
        wire_bytes: bytes that leave the device each time it runs, with ring algorithms.
        group: number of devices that take part.
        times: number of runs in a step.
        crosses: whether it leaves the slice.
    """

    kind: str
    operand_bytes: int
    dtype: str
    wire_bytes: float
    group: int
    times: int
    crosses: bool


_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


def _arrays(shape: str) -> list[Array]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if dtype in BYTES:
            count = math.prod(int(n) for n in sizes.split(",") if n)
            found.append(Array(dtype, count * BYTES[dtype], not re.search(r"S\([1-9]", layout)))
    return found


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Return the entry computation's name, and the instructions of every computation, of an HLO text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) ", line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
            continue
        stripped = line.lstrip()
        name, equals, right = stripped.removeprefix("ROOT ").partition(" = ")
        if not equals or not name.startswith("%"):
            continue
        end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
        shape, right = right[:end], right[end + 1 :]
        bracket = right.index("(")
        close = _closing(right, bracket)
        operands = _NAME.findall(right[bracket:close])
        value = right[bracket + 1 : close] if right.startswith(("constant", "parameter")) else ""
        rest = value or right[close + 1 :]
        root = stripped.startswith("ROOT ")
        current.append(Instruction(name[1:], right[:bracket], _arrays(shape), operands, rest, root))
    return entry, computations


class Program:
    """A compiled program's instructions, each with how often it runs in a step."""

    def __init__(self, text: str):
        self.entry, self.computations = parse(text)
        self.by_name = {
            name: {instruction.name: instruction for instruction in body} for name, body in self.computations.items()
        }
        self.times: dict[str, int] = defaultdict(int)
        self.called: set[str] = set()  # by a single instruction, such as a fusion
        self._count(self.entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            called = dict(re.findall(r"(condition|body|to_apply|calls)=%([\w.\-]+)", instruction.rest))
            if instruction.opcode == "while":
                self._count(called["body"], times * self._trips(name, instruction, called))
            elif instruction.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", instruction.rest.partition("branch_computations")[2][:2000]):
                    if branch in self.computations:
                        self._count(branch, times)
            elif instruction.opcode in ("call", "async-start", "fusion"):
                inner = called.get("to_apply") or called["calls"]
                self.called.add(inner)
                self._count(inner, times)

    def _trips(self, caller: str, loop: Instruction, called: dict[str, str]) -> int:
        """Return how often a loop runs: as annotated by the compiler, or from its counter's start, step and end."""
        known = re.search(r'known_trip_count[^\d]*"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition = self.by_name[called["condition"]]
        compare = next(i for i in condition.values() if i.root)
        values = [condition[name] for name in compare.operands]
        end = next((int(v.rest) for v in values if v.opcode == "constant"), 1)
        counter = next((v for v in values if v.opcode == "get-tuple-element"), None)
        if counter is None:
            return max(end, 1)
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = self._constant(caller, loop.operands[0], index) or 0
        step = self._step(called["body"], index)
        inclusive = "direction=LE" in compare.rest
        return max(-(-(end + inclusive - start) // step), 1)

    def _constant(self, computation: str, name: str, index: int) -> int | None:
        """Return the constant at an index of a tuple; None if it is not a constant."""
        here = self.by_name[computation]
        packed = here.get(name)
        if packed is None or packed.opcode != "tuple":
            return None
        value = here.get(packed.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = here.get(value.operands[0])
        return int(value.rest) if value is not None and value.opcode == "constant" else None

    def _step(self, body: str, index: int) -> int:
        """Return the increment of a loop's counter."""
        here = self.by_name[body]
        value = here[next(i for i in here.values() if i.root).operands[index]]
        total, seen = 0, 0
        while value.opcode in ("add", "copy", "bitcast", "fusion") and seen < 64:
            seen += 1
            operands = [here[name] for name in value.operands if name in here]
            if value.opcode == "add":
                total += sum(int(o.rest) for o in operands if o.opcode == "constant")
            elif value.opcode == "fusion":  # a counter raised inside a fusion: by its constant
                inner = self.computations[re.search(r"calls=%([\w.\-]+)", value.rest)[1]]
                total += sum(int(i.rest) for i in inner if i.opcode == "constant" and i.rest.isdigit())
            value = next((o for o in operands if o.opcode != "constant"), operands[0])
        return max(total, 1)

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """Yield every instruction that runs, with its computation and how often it runs."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield name, instruction, times

    def collectives(self, chips_per_slice: int | None = None, num_slices: int = 1) -> list[Collective]:
        """Return the collectives of a step.

        An asynchronous collective appears in several fusions (start, update, done) under one channel and may continue
        inside a loop; it counts as often as it starts. Elsewhere a channel says nothing: collectives of `shard_map`
        share one. Between slices there are no collectives but transfers through the hosts, which name the collective
        that they are part of.

        Args:
            chips_per_slice: number of devices of a slice, numbered slice by slice; None for one slice.
        """
        found: dict[tuple[str, int], Collective] = {}
        for number, (computation, instruction, times) in enumerate(self.instructions()):
            if computation.startswith(ASYNC_FUSION):
                continue
            here = self.by_name[computation]
            arrays = [a for name in instruction.operands if name in here for a in here[name].arrays]
            operand = sum(a.bytes for a in arrays)
            kind = instruction.opcode.removesuffix("-start")
            transfer = re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)
            if instruction.opcode == "send" and transfer:
                kind, group, crosses = transfer[1].lower().replace("_", "-"), num_slices, True
            elif kind in COLLECTIVES:
                group, crosses = _group(instruction.rest, chips_per_slice)
            else:
                continue
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            # An all-reduce of float32 may return bfloat16: the values are then rounded before they are sent.
            sent = min(operand, sum(a.bytes for a in instruction.arrays)) if kind == "all-reduce" else operand
            dtype = max(arrays, key=lambda a: a.bytes, default=Array("", 0, True)).dtype
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (channel[1] if channel and computation in self.called else f"#{number}", times)
            wire = sent * _wire_share(kind, group)
            found[key] = Collective(kind, operand, dtype, wire, group, times, crosses)
        return [c for c in found.values() if c.group > 1]

    def hbm_bytes(self) -> float:
        """Return the bytes that a step reads from HBM and writes to it, on one device.

        Arrays in on-chip memory count as 0. A slice that is read or written inside a fusion counts as the slice.
        """
        inside = {
            name
            for instructions in self.computations.values()
            for i in instructions
            if i.opcode == "fusion"
            for name in re.findall(r"calls=%([\w.\-]+)", i.rest)
        }
        total = 0.0
        for computation, instruction, times in self.instructions():
            if computation not in inside and instruction.opcode not in MOVES_NOTHING:
                total += times * self._moved(computation, instruction)
        return total

    def _moved(self, computation: str, instruction: Instruction) -> int:
        here = self.by_name[computation]
        operands = [here[name] for name in instruction.operands if name in here]
        written = sum(a.bytes for a in instruction.arrays if a.hbm)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            read = sum(a.bytes for a in instruction.arrays if operands[0].arrays and operands[0].arrays[0].hbm)
            return written + read
        if instruction.opcode == "dynamic-update-slice":
            part = sum(a.bytes for a in operands[1].arrays if a.hbm)
            return 2 * part
        if instruction.opcode == "copy-start":  # its shape holds the target, the source and a flag
            return sum(a.bytes for a in instruction.arrays[:2] if a.hbm)
        if instruction.opcode.endswith("-start"):
            return sum(a.bytes for a in instruction.arrays if a.hbm)
        if instruction.opcode != "fusion":
            return written + sum(a.bytes for o in operands for a in o.arrays if a.hbm)
        return self._moved_by_fusion(instruction)

    def _moved_by_fusion(self, fusion: Instruction) -> int:
        """Return the bytes of a fusion: parameters read, whole or in slices, and results written, or their update."""
        called = re.search(r"calls=%([\w.\-]+)", fusion.rest)[1]
        body = self.computations[called]
        inner = {i.name: i for i in body}
        # The operands of an asynchronous collective pass through the fusion that it overlaps with.
        beside = called.startswith("async_collective") or fusion.name.startswith("async-collective")
        passed = re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", fusion.rest) if beside else []
        through = {fusion.operands[int(operand)] for _, operand in passed}
        passing = [p for p, name in zip(parameters(body), fusion.operands, strict=False) if name in through]
        kept = [a for k, a in enumerate(fusion.arrays) if str(k) not in {out for out, _ in passed}]
        users = defaultdict(list)
        for i in body:
            for name in i.operands:
                users[name].append(i)
        total = updated = 0
        for parameter in body:
            if parameter.opcode != "parameter" or not parameter.arrays or not parameter.arrays[0].hbm:
                continue
            if parameter.name in passing:
                continue
            uses = users[parameter.name]
            if uses and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in uses):
                total += sum(u.arrays[0].bytes for u in uses)
            elif uses and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in uses):
                part = sum(inner[u.operands[1]].arrays[0].bytes for u in uses)
                total += part
                updated += parameter.arrays[0].bytes - part  # only this part of the result is written
            else:
                total += parameter.arrays[0].bytes
        return total + max(sum(a.bytes for a in kept if a.hbm) - updated, 0)


def parameters(body: list[Instruction]) -> list[str]:
    """Return the names of a computation's parameters, in their order."""
    found = [i for i in body if i.opcode == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(i.rest))]


def _wire_share(kind: str, group: int) -> float:
    """Return the bytes that leave a device for each byte of its operands, with ring algorithms."""
    n = max(group, 1)
    shares = {"all-gather": n - 1, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}
    return float({**shares, "all-to-all": (n - 1) / n}.get(kind, 1.0))


def _group(rest: str, chips_per_slice: int | None) -> tuple[int, bool]:
    """Return the number of devices in a collective, and whether they are in more than one slice."""
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)
    if pairs:
        ends = [tuple(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)\}?", pairs[1] + "}")]
        crosses = chips_per_slice is not None and any(a // chips_per_slice != b // chips_per_slice for a, b in ends)
        return 2, crosses
    group = _first_group(rest)
    crosses = chips_per_slice is not None and len({device // chips_per_slice for device in group}) > 1
    return len(group), crosses


def _first_group(rest: str) -> list[int]:
    """Return the devices of the first group, in any of HLO's three notations."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return [int(n) for n in listed[1].split(",") if n]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims = ([int(n) for n in iota[k].split(",")] for k in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        return _transposed(dims, order)[: shape[-1]]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=(\S+))? \{([^}]*)\}", rest)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'", mesh[3])
        names, strides, stride = list(sizes), {}, 1
        for name in reversed(names):
            strides[name], stride = stride, stride * sizes[name]
        group = [0]
        for name in chosen:
            group = [g + k * strides[name] for g in group for k in range(sizes[name])]
        reordered = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", mesh[2] or "")
        if reordered:
            devices = _transposed(*([int(n) for n in reordered[k].split(",")] for k in (1, 2)))
            group = [devices[position] for position in group]
        return group
    return [0]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """Return iota(prod(dims)), reshaped to dims, transposed by order, and flattened."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    flat = [0]
    for axis in order:
        flat = [f + k * strides[axis] for f in flat for k in range(dims[axis])]
    return flat
