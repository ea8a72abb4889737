# SPDX-License-Identifier: Apache-2.0
"""A study of seconds, for tests of the command line. It logs every third step."""

from dataclasses import replace

from research.train.experiment import CheckpointPolicy, Experiment, Steps
from tests import tiny


def sweep() -> dict[str, Experiment]:
    base = tiny.experiment(steps=30, log_every=3)
    return {"tiny": base, "longer": replace(base, length=Steps(40))}


def diverging() -> dict[str, Experiment]:
    return {
        "tiny": replace(tiny.experiment(steps=30), optimizer=replace(tiny.experiment().optimizer, peak=1e30, clip=0.0))
    }


def resumed() -> dict[str, Experiment]:
    """The second run is long enough to be stopped in its middle."""
    long = tiny.experiment(steps=1000, log_every=3, checkpoint=CheckpointPolicy(every=50))
    return {"short": replace(long, length=Steps(30)), "long": long}


nothing = 3
