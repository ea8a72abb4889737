# SPDX-License-Identifier: Apache-2.0
"""Runs for several hosts of eight devices in all: plain SGD, so that rounding stays as small as it is."""

from dataclasses import replace

from research.core.sharding import MeshSpec
from research.train.experiment import CheckpointPolicy, Experiment, Steps
from research.train.optimizers import Sgd
from tests import tiny

MESHES = {"data": MeshSpec(data=8), "mixed": MeshSpec(data=2, fsdp=2, tensor=2)}


def sweep() -> dict[str, Experiment]:
    base = tiny.experiment(steps=12, optimizer=Sgd(peak=0.1), checkpoint=CheckpointPolicy(every=6))
    return {name: replace(base, mesh=mesh) for name, mesh in MESHES.items()}


def long() -> dict[str, Experiment]:
    """Long enough to be stopped in its middle."""
    return {name: replace(e, length=Steps(120)) for name, e in sweep().items()}


def with_a_wild_one() -> dict[str, Experiment]:
    """The same, after a run whose loss becomes infinite."""
    wild = replace(sweep()["mixed"], optimizer=Sgd(peak=1e30), length=Steps(8))
    return {"wild": wild, **sweep()}
