# SPDX-License-Identifier: Apache-2.0
"""Runs for several hosts of eight devices in all: plain SGD, so that rounding stays as small as it is; and every expert
chosen, so that it turns no choice. Two hosts of four devices share out the first of a mesh's axes."""

from dataclasses import replace

from research.core.sharding import MeshSpec
from research.models.moe import Moe
from research.models.routers import TopK
from research.train.experiment import CheckpointPolicy, Experiment, Steps
from research.train.optimizers import Sgd
from tests import tiny

MESHES = {
    "data": MeshSpec(data=8),
    "mixed": MeshSpec(data=2, fsdp=2, tensor=2),
    "stages": MeshSpec(data=1, stage=2, fsdp=4),
    "experts": MeshSpec(data=1, expert=4, context=2),
}


def sweep() -> dict[str, Experiment]:
    base = tiny.experiment(steps=12, optimizer=Sgd(peak=0.1), checkpoint=CheckpointPolicy(every=6))
    found = {name: replace(base, mesh=mesh) for name, mesh in MESHES.items()}
    experts = replace(base.model, mlp=Moe(4, 16, TopK(4)))
    return found | {"experts": replace(found["experts"], model=experts)}


def long() -> dict[str, Experiment]:
    """One that is long enough to be stopped in its middle."""
    return {"mixed": replace(sweep()["mixed"], length=Steps(120))}


def with_a_wild_one() -> dict[str, Experiment]:
    """The same, after a run whose loss becomes infinite."""
    wild = replace(sweep()["mixed"], optimizer=Sgd(peak=1e30), length=Steps(8))
    return {"wild": wild, **sweep()}
