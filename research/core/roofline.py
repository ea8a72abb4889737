# SPDX-License-Identifier: Apache-2.0
"""The least time that a compiled program can take on a TPU slice: a roofline over what it computes, reads and sends.

    seconds(program, count(program), slice_of("v5e-256"), positions)    # Roofline(compute=..., hbm=..., ici=..., ...)

Each part is counted from the program's text and divided by the chip's published rate (``research.core.chips``). A
program that overlaps all of them perfectly takes as long as the longest (Williams et al. 2009), one that overlaps none
as long as their sum: a real one lies between. Links: a group of chips that spans an axis of the torus uses both of the
axis's links where it spans all of it and it wraps around, else one; what must be received is ``bytes (n - 1) / n``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from research.core.chips import Slice
from research.core.hlo import BETWEEN, Collective, Program
from research.core.hlo_cost import Counts

Position = tuple[int, ...]  # of a chip in its slice


@dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program: of matrix products, of HBM, of links within a slice and between slices."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def parts(self) -> dict[str, float]:
        return {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}

    @property
    def seconds(self) -> float:
        """All parts overlapping perfectly: no run is faster."""
        return max(self.parts.values())

    @property
    def one_by_one(self) -> float:
        """No part overlapping another."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What takes longest: compute, HBM, ICI or DCN."""
        return max(self.parts, key=lambda name: self.parts[name])


def seconds(program: Program, counts: Counts, where: Slice, positions: Sequence[Position]) -> Roofline:
    """counts: the program's. positions: of its devices, in its order; of several slices one after the other."""
    chip = where.chip
    ici = dcn = 0.0
    for collective in program.collectives():
        if collective.kind == BETWEEN:
            dcn += collective.runs * collective.bytes / chip.network_bandwidth
        else:
            ici += collective.runs * on_links(collective, where, positions)
    return Roofline(counts.all_flops / chip.peak_flops, counts.hbm_bytes / chip.hbm_bandwidth, ici, dcn)


def on_links(collective: Collective, where: Slice, positions: Sequence[Position]) -> float:
    """Seconds of one run of a collective within a slice."""
    group = [positions[i] for i in collective.group or range(len(positions))]
    chips, rate = len(set(group)), where.chip.link_bandwidth
    if chips < 2:
        return 0.0
    if collective.kind == "collective-permute":
        hops = max(_hops(where, a, b) for a, b in zip(group[::2], group[1::2], strict=True))
        return collective.bytes * hops / rate
    spans = [_Span.of(sorted({p[axis] for p in group}), side, wraps)
             for axis, (side, wraps) in enumerate(zip(where.sides, where.wraps, strict=True))]  # fmt: skip
    if collective.kind.endswith("all-to-all"):
        return collective.bytes / rate * max(span.crowding for span in spans)
    links = max(1.0, sum(span.links for span in spans))
    if math.prod(span.chips for span in spans) != chips:  # no box of chips: one path through all of them
        links = 1.0
    trips = 2 if collective.kind == "all-reduce" else 1
    return trips * collective.bytes * (chips - 1) / chips / (links * rate)


@dataclass(frozen=True)
class _Span:
    """How a group of chips lies along one axis. stride: steps from one of its chips to the next, that other groups'
    chips lie between and use the same links. ring: whether it goes all around."""

    chips: int
    stride: int
    ring: bool

    @classmethod
    def of(cls, places: Sequence[int], side: int, wraps: bool) -> "_Span":
        if len(places) < 2:
            return cls(len(places), 1, False)
        stride = min(b - a for a, b in zip(places, places[1:], strict=False))
        return cls(len(places), stride, wraps and len(places) * stride >= side and side > 2)

    @property
    def links(self) -> float:
        """Links that bring data to each chip, the worst placed one."""
        return 0.0 if self.chips < 2 else (2.0 if self.ring else 1.0) / self.stride

    @property
    def crowding(self) -> float:
        """Of an exchange between all, the share of a chip's data that the most crowded link carries: half of all goes
        through the middle, over one link of a line and two of a ring."""
        return 0.0 if self.chips < 2 else self.chips * self.stride / (8 if self.ring else 4)


def _hops(where: Slice, a: Position, b: Position) -> int:
    away = 0
    for x, y, side, wraps in zip(a, b, where.sides, where.wraps, strict=False):
        away += min(abs(x - y), side - abs(x - y)) if wraps else abs(x - y)
    return away
