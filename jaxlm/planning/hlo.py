"""Collectives read off a compiled program: kind, mesh axes, how often, how many bytes.

XLA's text tells each collective once, however often the loop around it turns; here it is counted as
often as it runs, by the loops' known trip counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = "slices"  # stands for the mesh axes of what goes through hosts from slice to slice
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4,
          "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes, in one step on one device. `bytes` are
    those of the whole array: what is gathered, what is to be scattered, reduced or sent."""

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float

    def moved(self, members: int) -> float:
        """Bytes that must reach each of `members` devices in a ring."""
        if members == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (members - 1) / members


def collectives(text: str, shape: dict[str, int], steps: int = 1) -> tuple[Collective, ...]:
    """Of one of the `steps` steps in the text of a compiled program, largest first. `shape`: the
    mesh that it was compiled for, in the order of its devices."""
    program = _parsed(text)
    runs = _runs(program)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    seen: set[str] = set()
    for name, lines in program.items():
        for line in lines:
            if line.kind is None or not runs.get(name):
                continue
            # TPU: one that is overlapped in a chain of fusions is told in each, by one channel.
            if chained := re.search(r"channel_id=(\d+),.*chain_id=", line.rest):
                if chained[1] in seen:
                    continue
                seen.add(chained[1])
            group = _group(line, math.prod(shape.values()))
            axes = (SLICES,) if line.opcode == "send" else _axes(group, shape)
            if not axes:
                continue
            scatters = line.kind == "all-reduce" and name.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scatters else line.kind
            size = line.bytes * (len(group) if line.kind == "reduce-scatter" else 1)
            if line.opcode == "ragged-all-to-all":  # of what is sent and the room for it: the less
                size = min([size, *_operands(line, lines)])
            total = found.setdefault((kind, axes), [0.0, 0.0])
            total[0] += runs[name] / steps
            total[1] += runs[name] * size / steps
    rows = [Collective(*key, *total) for key, total in found.items()]
    return tuple(sorted(rows, key=lambda c: -c.bytes))


@dataclass(frozen=True)
class _Line:
    """An instruction that calls computations or moves bytes between devices."""

    name: str
    opcode: str
    shape: str
    rest: str  # operands and attributes

    @property
    def kind(self) -> str | None:
        if self.opcode == "send":  # several slices: the hosts' runtime reduces what is sent
            found = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.rest)
            return found[1].lower().replace("_", "-") if found else None
        kind = self.opcode.removesuffix("-start").removeprefix("ragged-")
        return kind if kind in KINDS else None

    @property
    def bytes(self) -> int:
        """Of the result: of an asynchronous one that names its operands too, the larger half."""
        sizes = [_BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n)
                 for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", self.shape)]  # fmt: skip
        if self.opcode == "send":
            return sizes[0]
        if self.opcode in ("all-gather-start", "collective-permute-start"):
            return max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
        return sum(sizes)


def _operands(line: _Line, lines: list[_Line]) -> list[int]:
    """Bytes of the first operand."""
    first = line.rest.split(",")[0].strip().lstrip("%")
    return [row.bytes for row in lines if row.name == first]


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")


def _parsed(text: str) -> dict[str, list[_Line]]:
    """Computation → its instructions; the entry is called 'ENTRY'."""
    program: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = program.setdefault("ENTRY" if head[1] else head[2], [])
        elif found := _INSTRUCTION.match(row):
            lines.append(_Line(found[1], found[3], found[2], found[4]))
    return program


def _runs(program: dict[str, list[_Line]]) -> dict[str, float]:
    """Computation → how often it runs in one run of the program."""
    runs = dict.fromkeys(program, 0.0)
    order: list[str] = []

    def visit(name: str, path: frozenset[str] = frozenset()) -> None:
        if name in order or name in path:
            return
        for line in program[name]:
            for callee, _ in _calls(program, line):
                visit(callee, path | {name})
        order.append(name)

    visit("ENTRY")
    runs["ENTRY"] = 1.0
    for name in reversed(order):  # callers before what they call
        for line in program[name]:
            for callee, times in _calls(program, line):
                runs[callee] += runs[name] * times
    return runs


def _calls(program: dict[str, list[_Line]], line: _Line) -> list[tuple[str, float]]:
    """(computation, how often) that an instruction calls; not the scalar ones of a reduction."""
    names = re.findall(r"(?:calls|body|branch_computations)=\{?%?([\w.\-]+)", line.rest)
    more = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line.rest)
    times = _trips(program, line) if line.opcode == "while" else 1.0
    return [(n, times) for n in [*names, *more] if n in program]


def _trips(program: dict[str, list[_Line]], line: _Line) -> float:
    """Of a while: as the compiler notes it, or the bound that its counter, from 0, is held to."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line.rest):
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
    constants = {
        row.rest.split(")")[0]
        for row in program.get(condition[1] if condition else "", ())
        if row.opcode == "constant" and row.shape.startswith("s32[]")
    }
    return float(constants.pop()) if len(constants) == 1 else 1.0


_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{(.*?)\}"
)


def _group(line: _Line, devices: int) -> list[int]:
    """The devices (as places in the mesh) that the first device of a collective meets."""
    text = line.rest
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return [int(n) for n in re.findall(r"\d+", pairs[1].partition("}")[0])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))[0].tolist()
    if named := _NAMED.search(text):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2], named[3]) if named[2] else np.arange(devices)
        taken = re.findall(r"'(\w+)'", named[4])
        index = tuple(slice(None) if axis in taken else 0 for axis in sizes)
        return ids.reshape(tuple(sizes.values()))[index].reshape(-1).tolist()
    return list(range(devices))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(dims: str, transposed: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(transposed)) if transposed else ids).reshape(-1)


def _axes(group: list[int], shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(group, tuple(shape.values())))
    return tuple(a for a, row in zip(shape, places, strict=True) if len(set(row.tolist())) > 1)
