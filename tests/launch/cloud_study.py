# SPDX-License-Identifier: Apache-2.0
"""Four short runs for two hosts of two devices, one of which crashes from a bug of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from research.core.sharding import MeshSpec
from research.core.types import Context, EvalRun, Metrics, Policy
from research.train.experiment import CheckpointPolicy, Experiment, Steps
from tests import tiny


@dataclass(frozen=True)
class Bug:
    """An evaluation that fails as code does."""

    every: int = 10
    name: str = "bug"

    def start(self, context: Context) -> EvalRun:
        def run(policy: Policy, step: int) -> Metrics:
            table: Mapping[str, float] = {}
            return {"bug/value": table["missing"]}

        return run


def sweep() -> dict[str, Experiment]:
    base = tiny.experiment(steps=40, mesh=MeshSpec(data=1, fsdp=4), checkpoint=CheckpointPolicy(every=10))
    runs = {f"run{i}": replace(base, seed=i, length=Steps(40 + i)) for i in range(3)}
    return {**runs, "bug": replace(base, evals=(Bug(),), length=Steps(60))}
