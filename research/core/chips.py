# SPDX-License-Identifier: Apache-2.0
"""TPU chips and their slices: what one chip can do, and which slices there are, by Google's published figures.

    slice_of("v5e-256").topology      # "16x16"
    slice_of("v5p-128").chips         # 64: the names of v4 and v5p count TensorCores, two a chip

Sources, read in November 2026: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (peak FLOP/s, HBM, bidirectional
inter-chip bandwidth, ports, slice shapes, hosts); the links of v4 are those of Jouppi et al. 2023, table 4 (six of 50
GB/s); network bandwidth of v5e and v6e is that of a pod over its chips, of v4 that of Jouppi et al.'s hosts.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from research.core.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip. peak_flops: dense bfloat16 FLOP/s. hbm_bytes, hbm_bandwidth (bytes/s). links: to its neighbours, each
    of ``link_bandwidth`` bytes/s one way. network_bandwidth: bytes/s of its share of the host's data-centre network.
    cores: TensorCores. shapes: the slices that can be asked for, by number of chips. kinds: what JAX calls its
    devices. accelerator: how gcloud writes it."""

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    network_bandwidth: float
    cores: int
    chips_per_host: int
    shapes: Mapping[int, str]
    kinds: tuple[str, ...]
    accelerator: str

    @property
    def counts_cores(self) -> bool:
        """Whether the names of slices count TensorCores."""
        return self.cores > 1


@dataclass(frozen=True)
class Slice:
    """A slice of one pod, as it can be asked for. name: as the user gave it, v5e-256."""

    name: str
    chip: Chip
    chips: int

    @property
    def topology(self) -> str:
        """Chips each way: 16x16."""
        return self.chip.shapes[self.chips]

    @property
    def compiled_as(self) -> str:
        """The name of the topology for the compiler."""
        return f"{self.chip.name}:{self.topology}"

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(int(n) for n in self.topology.split("x"))

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which axes the last chip is linked to the first. Of v4 and v5p the slices of whole 4 x 4 x 4 cubes are
        tori (Jouppi et al. 2023, section 2.2); of v5e and v6e the sides of 16 chips, a pod's whole width."""
        if self.chip.links == 6:
            return (all(side % 4 == 0 for side in self.sides),) * 3
        return tuple(side == 16 for side in self.sides)

    @property
    def hosts(self) -> int:
        """Virtual machines: of four chips each, but for up to ``chips_per_host`` chips on one."""
        return 1 if self.chips <= self.chip.chips_per_host else self.chips // 4

    @property
    def accelerator_type(self) -> str:
        """As gcloud wants it: v5litepod-256."""
        return f"{self.chip.accelerator}-{self.chips * (self.chip.cores if self.chip.counts_cores else 1)}"


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SOLID = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
LARGE = SOLID | {4096: "16x16x16", 6144: "16x16x24"}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200e9, 6, 50e9, 6.25e9, 2, 4, SOLID, ("TPU v4",), "v4"),
        Chip("v5e", 197e12, 16e9, 819e9, 4, 50e9, 3.125e9, 1, 8, FLAT, ("TPU v5 lite", "TPU v5e"), "v5litepod"),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 6, 100e9, 6.25e9, 2, 4, LARGE, ("TPU v5", "TPU v5p"), "v5p"),
        Chip("v6e", 918e12, 32e9, 1638e9, 4, 100e9, 12.5e9, 1, 8, FLAT, ("TPU v6 lite", "TPU v6e"), "v6e"),
    )
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}


def slice_of(name: str) -> Slice:
    """The slice of a name such as v5e-256, v5litepod-16 or v5p-128. Raises UserError naming what there is."""
    found = re.fullmatch(r"(v\d+\w*?)-(\d+)", name.strip().lower())
    chip = CHIPS.get(ALIASES.get(found[1], found[1])) if found else None
    if found is None or chip is None:
        raise UserError(
            f"{name!r} names no TPU slice: give a chip of {', '.join(CHIPS)} and a size, such as v5e-256 or v5p-128."
        )
    asked = int(found[2])
    chips = asked / (chip.cores if chip.counts_cores else 1)
    if chips not in chip.shapes:
        sizes = [count * (chip.cores if chip.counts_cores else 1) for count in chip.shapes]
        near = sorted(sizes, key=lambda size: abs(math.log(size / max(asked, 1))))[:2]
        what = "TensorCores" if chip.counts_cores else "chips"
        raise UserError(
            f"There is no slice {name}: {chip.name} slices count {what} and come as "
            f"{', '.join(str(size) for size in sizes)} (near it: "
            f"{' and '.join(f'{chip.name}-{size}' for size in sorted(near))})."
        )
    return Slice(f"{chip.name}-{asked}", chip, int(chips))
