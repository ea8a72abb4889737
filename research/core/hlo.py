# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read off its HLO text: collectives with the bytes they move, and Pallas kernels.

Loops count as often as they run: ``cost_analysis`` counts their bodies once. Fusions and calls are followed: on TPUs
a reduce-scatter is a fusion that calls ``%all-reduce-scatter...``, an all-gather may be spread over several fusions
of one channel, and a product may fetch its matrix piece by piece, by collective-permutes in a loop of its own. What
crosses from slice to slice leaves through the host: "between-slices" here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BETWEEN = "between-slices"
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8": 8, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^((?:\((?:[^()]|\([^()]*\))*\)|\S)+) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """bytes: of one run on one device, at its larger end: what an all-gather gives, what a reduce-scatter takes, the
    array of the others, the smaller of a ragged one's two, what is sent between slices. runs: how often the program
    does it. group: the first of the groups that do it, as positions in the program's order of devices; of a permute
    its pairs, one after the other; empty: all devices, or not in the text."""

    kind: str
    bytes: int
    runs: int
    name: str
    group: tuple[int, ...] = ()


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @property
    def operands(self) -> list[str]:
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end]) or self.rest[:end].replace(" ", "").split(",")
        return []

    def attribute(self, name: str) -> str:
        found = re.search(rf'\b{name}=[%"]?([\w.\-]+)', self.rest)
        return found[1] if found else ""


_Computation = dict[str, Instruction]


class Program:
    """The text of a compiled program (``compiled.as_text()``)."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        current: _Computation = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) and (typed := _OPCODE.match(found[3])):
                rest = found[3][typed.end() :]
                current[found[2]] = Instruction(found[2], typed[1], typed[2], rest, bool(found[1]))
        self._busy: dict[str, bool] = {}

    def collectives(self) -> list[Collective]:
        """Every collective that is run. Raises ValueError for one in a loop whose trips are not in the text."""
        found, seen = [], set()
        for frame, place, instruction, runs in self._walk(self.entry, 1, self.entry):
            kind = self._kind(instruction, place)
            chain = instruction.attribute("chain_id") and instruction.attribute("channel_id")
            if kind is None or (chain and (frame, chain) in seen):  # one collective, spread over fusions
                continue
            seen.add((frame, chain))
            start = self.computations[place].get(instruction.operands[0]) if instruction.operands else None
            said = first_group(instruction.rest) or (first_group(start.rest) if start is not None else ())
            found.append(Collective(kind, self._bytes(kind, instruction, place), runs, instruction.name, said))
        return found

    def traffic(self) -> dict[str, int]:
        """Bytes per device of each kind of collective, loops multiplied in."""
        total: Counter[str] = Counter()
        for collective in self.collectives():
            total[collective.kind] += collective.bytes * collective.runs
        return dict(total)

    def kernels(self) -> dict[str, int]:
        """How often each Pallas kernel for TPUs is run, by its name."""
        total: Counter[str] = Counter()
        for _, _, instruction, runs in self._walk(self.entry, 1, self.entry):
            if is_kernel(instruction):
                total[plain_name(instruction)] += runs
        return dict(total)

    def _kind(self, instruction: Instruction, place: str) -> str | None:
        """The kind of a collective; of an asynchronous pair the end counts, whose type is that of the result."""
        opcode = instruction.opcode
        if opcode == "send" and "xla_megascale_runtime" in instruction.rest:
            return BETWEEN
        opcode = opcode.removesuffix("-done")
        if opcode == "all-reduce" and place.startswith("all-reduce-scatter"):
            return "reduce-scatter"
        return opcode if opcode in KINDS else None

    def _bytes(self, kind: str, instruction: Instruction, place: str) -> int:
        if kind not in ("reduce-scatter", "ragged-all-to-all", BETWEEN):
            return size(instruction.type)
        operands = [self.computations[place].get(name) for name in instruction.operands]
        sizes = [size(operand.type) for operand in operands if operand is not None]
        # of a ragged one, what there is to send at most; the room for it may be larger on one side
        return min(size(instruction.type), *sizes[:1]) if kind == "ragged-all-to-all" else sum(sizes)

    def _walk(self, place: str, runs: int, frame: str) -> Iterator[tuple[str, str, Instruction, int]]:
        """(loop body, computation, instruction, how often it is run), through loops, fusions and calls."""
        for instruction in self.computations.get(place, {}).values():
            yield frame, place, instruction, runs
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                if self._is_busy(body):
                    yield from self._walk(body, runs * self._trips(instruction, place), f"{frame}/{instruction.name}")
            elif not instruction.opcode.endswith("-done"):  # its start has been followed
                for inner in called(instruction):
                    yield from self._walk(inner, runs, frame)

    def walk_all(self, unknown: list[str], place: str = "", runs: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it is run) of everything; ``unknown`` takes the names of loops whose
        trips are not in the text, which count once."""
        place = place or self.entry
        for instruction in self.computations.get(place, {}).values():
            yield place, instruction, runs
            if instruction.opcode == "while":
                try:
                    trips = self._trips(instruction, place)
                except (ValueError, KeyError):
                    trips = 1
                    unknown.append(instruction.name)
                yield from self.walk_all(unknown, instruction.attribute("body"), runs * trips)
            elif not instruction.opcode.endswith("-done"):  # its start has been followed
                for inner in called(instruction):
                    yield from self.walk_all(unknown, inner, runs)

    def _is_busy(self, place: str) -> bool:
        """Whether there is anything to count below: only then do a loop's trips matter."""
        if place not in self._busy:
            self._busy[place] = False
            for instruction in self.computations.get(place, {}).values():
                inner = [*called(instruction), instruction.attribute("body")]
                here = self._kind(instruction, place) is not None or is_kernel(instruction)
                if here or any(self._is_busy(name) for name in inner if name):
                    self._busy[place] = True
                    break
        return self._busy[place]

    def _trips(self, loop: Instruction, place: str) -> int:
        """What the compiler noted, or what the condition says: a counter below a constant."""
        if noted := re.search(r'known_trip_count\D*"?n"?\D*(\d+)', loop.rest):
            return int(noted[1])
        condition, body = (self.computations[loop.attribute(name)] for name in ("condition", "body"))
        test = root(condition)
        while test.opcode in ("fusion", "call") and (inner := called(test)):
            test = root(self.computations[inner[0]])
        limits = [i for i in condition.values() if i.opcode == "constant"]
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        if test.opcode != "compare" or test.attribute("direction") != "LT" or len(limits) != 1 or len(counters) != 1:
            raise ValueError(f"The program does not say how often {loop.name} runs.")
        index, here = int(counters[0].attribute("index")), self.computations[place]
        start = _constant(_element(here, loop.operands[0], index), here)
        step = _step(_element(body, root(body).name, index), body)
        if start is None or step is None:
            raise ValueError(f"The program does not say how often {loop.name} runs.")
        return math.ceil((literal(limits[0]) - start) / step)


def first_group(attributes: str) -> tuple[int, ...]:
    """The first of a collective's groups of devices, or the pairs of a permute, in each of the ways that they are
    written: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'b'}."""
    if pairs := re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes):
        return tuple(int(n) for n in re.findall(r"\d+", pairs[1]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if tiled := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return tuple(_devices(tiled[2]).reshape(_numbers(tiled[1]))[0].tolist())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes)
    if named is None:
        return ()
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    order = _devices(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
    inside = re.findall(r"'([^']+)'", named[3])
    grid = order.reshape(list(sizes.values()))[tuple(slice(None) if name in inside else 0 for name in sizes)]
    return tuple(grid.ravel().tolist())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _devices(text: str) -> np.ndarray:
    """Devices in an order written as [8,8]T(1,0): counted in rows of the first shape, its axes then exchanged."""
    shape, _, axes = text.partition("T")
    grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (grid.transpose(_numbers(axes)) if axes else grid).ravel()


def size(type_text: str) -> int:
    """Bytes of the arrays in an HLO type."""
    total = 0
    for dtype, dims in _ARRAY.findall(type_text):
        bits = BITS.get(dtype) or BITS.get(dtype[:2]) or int(re.sub(r"\D", "", dtype) or 0)
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def dims(type_text: str) -> list[int]:
    """Of the first array in an HLO type."""
    found = _ARRAY.search(type_text)
    return [int(n) for n in found[2].split(",") if n] if found else []


def plain_name(instruction: Instruction) -> str:
    """Without the numbers that tell copies apart."""
    return re.sub(r"(\.\d+|\.clone)+$", "", instruction.name)


def is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") == "tpu_custom_call"


def called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.findall(instruction.rest)
    return _CALLED.findall(instruction.rest) + [name.strip(" %") for group in branches for name in group.split(",")]


def root(computation: _Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _element(computation: _Computation, name: str, index: int) -> Instruction | None:
    """Element ``index`` of a tuple that is put together in the computation."""
    whole = computation.get(name)
    if whole is None or whole.opcode != "tuple" or index >= len(whole.operands):
        return None
    return computation.get(whole.operands[index])


def literal(constant: Instruction) -> int:
    return int(constant.rest.split(")")[0])


def _constant(instruction: Instruction | None, computation: _Computation) -> int | None:
    while instruction is not None and instruction.opcode in ("copy", "convert", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return literal(instruction) if instruction is not None and instruction.opcode == "constant" else None


def _step(instruction: Instruction | None, body: _Computation) -> int | None:
    """What the body adds to a loop's counter, where it is a constant."""
    if instruction is None or instruction.opcode != "add":
        return None
    parts = (_constant(body.get(name), body) for name in instruction.operands)
    return next((part for part in parts if part), None)
