# SPDX-License-Identifier: Apache-2.0
"""Reading a metric never stalls the next step: a step's numbers are read once the next one is under way."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from research.train import checkpoint, loop, metrics
from research.train.experiment import CheckpointPolicy
from research.train.interrupt import Interrupt
from research.train.monitor import Monitor
from research.train.progress import Silent
from research.train.watchdog import Watchdog
from tests import tiny

STEPS = 4


class Number:
    """A number still being computed on a device: whoever asks for it waits, and is written down."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.step}")
        return np.asarray(1.0 / self.step, dtype or np.float32)

    def block_until_ready(self):
        self.log.append(f"read {self.step}")
        return self

    def __float__(self):
        return float(self.__array__())


def measured(step, log):
    return {
        "loss": Number(step, log),
        "grad_norm": np.float32(1),
        "param_norm": np.float32(1),
        "learning_rate": np.float32(1),
    }


@pytest.fixture
def monitor(tmp_path):
    experiment = tiny.experiment(steps=STEPS, evals=(), checkpoint=CheckpointPolicy(every=0))
    checkpoints = checkpoint.Checkpointer(tmp_path, experiment.checkpoint)
    with Monitor(experiment, checkpoints, step=0, peak=None, progress=Silent(), watchdog=Watchdog("m", 0)) as made:
        yield made


def written(monitor):
    return [(line["step"], line["loss"]) for line in metrics.read(monitor.checkpoints.directory)]


def test_watching_reads_the_step_before_and_flushing_what_waits(monitor):
    log = []
    monitor.watch(1, measured(1, log))
    assert log == [] and written(monitor) == []
    monitor.watch(2, measured(2, log))
    assert log == ["read 1"] and written(monitor) == [(1, 1.0)]
    monitor.flush()
    assert log == ["read 1", "read 2"] and written(monitor) == [(1, 1.0), (2, 0.5)]
    monitor.flush()
    assert log == ["read 1", "read 2"]


def train(monitor, log, **changes):
    """The loop over a step that takes no time, writing down what it does."""

    def step(state, frozen, batch, rate):
        log.append(f"dispatch {state.step + 1}")
        return SimpleNamespace(step=state.step + 1), measured(state.step + 1, log)

    experiment = replace(monitor.experiment, **changes)
    program = SimpleNamespace(experiment=experiment, step=step, bind=lambda state: None, frozen={})
    stream = SimpleNamespace(next=lambda policy, index: {}, get_state=lambda: {}, report=lambda: {})
    store = SimpleNamespace(save=lambda step, *rest: log.append(f"save {step}"), wait=lambda: None)
    loop.train(program, SimpleNamespace(step=0), stream, [], store, monitor, Interrupt())


def test_the_loop_dispatches_a_step_before_it_reads_the_last(monitor):
    log = []
    train(monitor, log)
    assert log == [
        *("dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "dispatch 4", "read 3"),
        *("read 4", "save 4"),
    ]


def test_nothing_is_saved_before_its_own_step_is_read(monitor):
    log = []
    train(monitor, log, checkpoint=CheckpointPolicy(every=2))
    assert log == [
        *("dispatch 1", "dispatch 2", "read 1", "read 2", "save 2"),
        *("dispatch 3", "dispatch 4", "read 3", "read 4", "save 4"),
    ]
