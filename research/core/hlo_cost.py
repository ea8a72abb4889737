# SPDX-License-Identifier: Apache-2.0
"""What a compiled TPU program computes and reads: matrix FLOPs and bytes of HBM, counted over its text.

``cost_analysis`` counts the body of a loop once and leaves Pallas kernels out. Here loops count as often as they run
(``hlo.Program``), products are counted from their shapes wherever they stand (TPUs write them as convolutions), and
kernels from theirs. Bytes are those of arrays in HBM that each instruction outside fusions takes and gives; of an array
of which a slice alone is read or written, the slice's. What lies in VMEM (memory space S(1)) is not counted.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from research.core import hlo
from research.core.hlo import Instruction, Program

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_ELSEWHERE = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")  # arrays that are not in HBM
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "get-dimension-size", "domain",
}  # fmt: skip
NO_WORK = ("AllocateBuffer", "ConcatBitcast")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is put into the array, in place
ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4}  # products over all pairs of positions in each kernel of splash attention


@dataclass(frozen=True)
class Counts:
    """Of one run of the program on one device. flops: of matrix products. kernels: FLOPs of Pallas kernels by name.
    hbm_bytes: read and written. unknown: loops whose trips are not in the text, counted once."""

    flops: float
    kernels: dict[str, float]
    hbm_bytes: float
    unknown: tuple[str, ...]

    @property
    def all_flops(self) -> float:
        return self.flops + sum(self.kernels.values())


def count(program: Program, *, grouped_rows: float = math.inf) -> Counts:
    """grouped_rows: those that a grouped product has on average. Its array may have room for the worst case, and rows
    that nobody chose are not computed."""
    flops, moved, kernels = 0.0, 0.0, defaultdict[str, float](float)
    fused, unknown = _fused(program), list[str]()
    for place, instruction, runs in program.walk_all(unknown):
        if instruction.opcode in ("convolution", "dot"):
            flops += runs * product_flops(program, place, instruction)
        elif hlo.is_kernel(instruction):
            name = hlo.plain_name(instruction)
            kernels[name] += runs * kernel_flops(program, place, instruction, grouped_rows)
        if place not in fused:
            moved += runs * _moved(program, place, instruction)
    return Counts(flops, dict(kernels), moved, tuple(unknown))


def product_flops(program: Program, place: str, instruction: Instruction) -> float:
    """Two for each multiplication: of a ``dot``, or of the convolution that a TPU makes of one."""
    left, right = (_dims(program, place, name) for name in instruction.operands[:2])
    out = hlo.dims(instruction.type)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        indices = [int(i) for i in contracted[1].split(",") if i] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[i] for i in indices)
    labels = _LABELS.search(instruction.rest)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = (dict(zip(names, sizes, strict=False)) for names, sizes in
                                 zip(labels.groups(), (left, right, out), strict=True))  # fmt: skip
    window = _window(instruction.rest)
    total = 2.0 * of_out["b"] * of_out["f"] * of_right["i"]
    for index, name in enumerate(sorted(set(labels[3]) - {"b", "f"})):
        total *= _valid(of_left[name], of_right[name], of_out[name], {key: v[index] for key, v in window.items()})
    return total


def _window(rest: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    pairs = (part.split("=") for part in found[1].split()) if found else ()
    return {name: value.split("x") for name, value in pairs}


def _valid(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel positions along one dimension that meet an input, not padding or a gap."""
    stride, low = int(window.get("stride", "1")), int(window.get("pad", "0_0").split("_")[0])
    gaps, spread = int(window.get("lhs_dilate", "1")), int(window.get("rhs_dilate", "1"))
    end, met = (size - 1) * gaps + 1, 0
    for k in range(kernel):
        shift = k * spread - low  # input position of output 0
        if gaps == 1:
            first, last = max(0, -(shift // stride)), min(out - 1, (end - 1 - shift) // stride)
            met += max(0, last - first + 1)
        else:
            met += sum(0 <= (at := o * stride + shift) < end and at % gaps == 0 for o in range(out))
    return met


def kernel_flops(program: Program, place: str, instruction: Instruction, grouped_rows: float = math.inf) -> float:
    """Of the kernels that models here use: splash attention (half of the square of positions and the diagonal's blocks)
    and grouped products. 0 for others."""
    name = hlo.plain_name(instruction)
    if name.startswith("splash"):
        kind = next((kind for kind in ATTENTION if f"_{kind}_" in name), None)
        arrays = [d for operand in instruction.operands if len(d := _dims(program, place, operand)) >= 3
                  and _floating(program, place, operand)]  # fmt: skip
        if kind is None or len(arrays) < 2:
            return 0.0
        *heads, queries, width = arrays[0]
        keys = arrays[1][-2]
        block = re.search(r'block_q\\*": (\d+)', instruction.rest)
        diagonal = int(block[1]) / queries if block else 0.0
        return 2.0 * ATTENTION[kind] * math.prod(heads) * queries * keys * width * min(1.0, 0.5 + 0.5 * diagonal)
    if re.match(r"t?gmm", name):
        arrays = [d for operand in instruction.operands if len(d := _dims(program, place, operand)) >= 2]
        out = hlo.dims(instruction.type)
        rows = max((d[0] for d in arrays if len(d) == 2), default=0)
        weights = next((d for d in [*arrays, out] if len(d) == 3), None)
        return 2.0 * min(rows, grouped_rows) * weights[1] * weights[2] if weights else 0.0
    return 0.0


def _floating(program: Program, place: str, name: str) -> bool:
    found = program.computations[place].get(name)
    return found is not None and found.type.startswith(("bf16", "f32", "f16"))


def _dims(program: Program, place: str, name: str) -> list[int]:
    found = program.computations[place].get(name)
    return [] if found is None else hlo.dims(found.type)


def in_hbm(type_text: str) -> int:
    """Bytes of the arrays of a type that lie in HBM."""
    return hlo.size(_ELSEWHERE.sub("", type_text))


def _fused(program: Program) -> set[str]:
    """Computations whose instructions do not go through HBM: of fusions, reductions and the like."""
    found: set[str] = set()
    for computation in program.computations.values():
        for instruction in computation.values():
            if instruction.opcode not in ("call", "while", "conditional"):
                found.update(hlo.called(instruction))
    return found


def _moved(program: Program, place: str, instruction: Instruction) -> float:
    """Bytes that one instruction takes from HBM and puts there."""
    opcode, here = instruction.opcode, program.computations[place]
    if opcode in FREE or any(f'"{name}"' in instruction.rest for name in NO_WORK):
        return 0.0
    if opcode == "slice-done":  # of an asynchronous slice the end has the type
        return hlo.size(instruction.type)
    if opcode == "copy-done":
        start = here.get(instruction.operands[0])
        source = here.get(start.operands[0]) if start is not None else None
        return in_hbm(instruction.type) + (in_hbm(source.type) if source is not None else 0)
    if opcode.endswith(("-start", "-done")) and opcode.split("-")[0] in ("copy", "slice", "async"):
        return 0.0
    if opcode in SLICES:
        return in_hbm(instruction.type) + hlo.size(instruction.type)
    if opcode in UPDATES:
        update = here.get(instruction.operands[UPDATES[opcode]])
        return 2.0 * (hlo.size(update.type) if update is not None else 0)
    if opcode == "fusion":
        (inner,) = hlo.called(instruction)[:1] or ("",)
        if inner in program.computations:
            return _fusion(program, place, instruction, inner)
    taken = [here[name].type for name in instruction.operands if name in here]
    return in_hbm(instruction.type) + sum(in_hbm(kind) for kind in taken)


def _fusion(program: Program, place: str, instruction: Instruction, inner: str) -> float:
    here, total = program.computations[place], 0.0
    for index, name in enumerate(instruction.operands):
        operand = here.get(name)
        if operand is not None and (whole := in_hbm(operand.type)):
            total += min(whole, _read(program, inner, index, whole))
    inside = program.computations[inner]
    return total + _written(hlo.root(inside), inside, instruction.type)


def _read(program: Program, place: str, index: int, whole: float) -> float:
    """Bytes that a fusion's computation reads of its parameter ``index``: slices where slices are all it takes, in
    fusions within it too."""
    inside = program.computations[place]
    names = {i.name for i in inside.values() if i.opcode == "parameter" and hlo.literal(i) == index}
    total = 0.0
    for user in inside.values():  # a value comes before its users
        taken = [number for number, name in enumerate(user.operands) if name in names]
        if not taken:
            continue
        if user.opcode == "bitcast":
            names.add(user.name)
        elif user.opcode in SLICES and taken == [0]:
            total += hlo.size(user.type)
        elif user.opcode in UPDATES and taken == [0]:
            continue  # changed in place: what is written is counted
        elif user.opcode == "fusion" and (called := hlo.called(user)) and called[0] in program.computations:
            total += sum(_read(program, called[0], number, whole) for number in taken)
        else:
            return whole
    return min(total, whole)


def _written(root: Instruction, inside: dict[str, Instruction], type_text: str) -> float:
    """Bytes that a fusion writes: of an array that is changed in place, what is put into it."""
    if root.opcode == "bitcast" and root.operands[0] in inside:
        return _written(inside[root.operands[0]], inside, type_text)
    if root.opcode in UPDATES and root.operands[UPDATES[root.opcode]] in inside:
        return min(in_hbm(type_text), hlo.size(inside[root.operands[UPDATES[root.opcode]]].type))
    if root.opcode == "tuple":
        parts = [inside[name] for name in root.operands if name in inside]
        return sum(_written(part, inside, part.type) for part in parts)
    return in_hbm(type_text)
