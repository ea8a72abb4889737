# SPDX-License-Identifier: Apache-2.0
"""What the hosts of a slice say of themselves in the bucket (``launch.machine`` writes it), read as one."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import store
from launch.journal import AGAIN, ALONE, HINDERED, STALLED
from launch.machine import LEFT


@dataclass(frozen=True)
class Hosts:
    """said: by those of ``count`` hosts that have come up, by index."""

    said: Mapping[int, dict[str, Any]]
    count: int

    @classmethod
    def read(cls, folder: Path, count: int) -> "Hosts":
        names = [name for name in store.names(folder) if name.startswith("host-") and name.endswith(".json")]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda name: store.read_json(folder / name), names))
        said = {int(host["host"]): host for host in found if host is not None}
        return cls(said, max((host["hosts"] for host in said.values()), default=count))  # they know best

    @property
    def missing(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.said]

    @property
    def done(self) -> bool:
        """All have come and are through."""
        return not self.missing and self.through

    @property
    def through(self) -> bool:
        """All that have come are through."""
        return bool(self.said) and all(host["done"] for host in self.said.values())

    @property
    def current(self) -> str:
        return self.said[0]["current"] if 0 in self.said else ""

    @property
    def phase(self) -> str:
        if self.missing:
            return f"{len(self.said)} of {self.count} hosts are up"
        return self.said[0]["phase"]

    @property
    def left(self) -> bool:
        """Whether some saved and left, for their machines are to be taken away."""
        return any(host["phase"] == LEFT for host in self.said.values())

    @property
    def began(self) -> float | None:
        """When the first of them came up."""
        return min((host["began"] for host in self.said.values()), default=None)

    @property
    def newest(self) -> float | None:
        """When one of them gave its last sign of life."""
        return max((host["time"] for host in self.said.values()), default=None)

    @property
    def signs(self) -> dict[int, float]:
        """When those not through gave their last sign of life, by their own clocks."""
        return {i: host["time"] for i, host in self.said.items() if not host["done"]}

    def codes(self, runs: Sequence[str]) -> dict[str, int]:
        """Exit statuses of the runs that every host has left, as one for each."""
        found = {}
        for run in runs:
            left = [host["codes"][run] for host in self.said.values() if run in host["codes"]]
            if len(left) == self.count:
                found[run] = together(left)
        return found

    def words(self, runs: Sequence[str]) -> dict[str, str]:
        """The last words of failed runs, of a host whose status counts."""
        told = {}
        for run, code in self.codes(runs).items():
            mine = [host for host in self.said.values() if host["codes"][run] == code]
            if code and mine:
                told[run] = mine[0]["words"].get(run, "")
        return told

    def alone(self) -> bool:
        """Whether some are through because others did not come to them."""
        return self.through and any(ALONE in host["codes"].values() for host in self.said.values())


def together(codes: Sequence[int]) -> int:
    """One exit status for all hosts. A host that was asked to save and leave takes the others with it; a crash of one
    makes the others leave otherwise, and is what counts."""
    for kind in (AGAIN, (ALONE,), (STALLED,), (HINDERED,)):
        if found := [code for code in codes if code in kind]:
            return found[0]
    crashes = [code for code in codes if code not in (0, 2)]
    return crashes[0] if crashes else max(codes)
