# SPDX-License-Identifier: Apache-2.0
"""A run that makes no progress ends itself and says what it waited for."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

IDLE = """
import sys, time
from research.train.watchdog import Watchdog
with Watchdog("tiny", minutes=float(sys.argv[1]) / 60) as dog:
    dog.expect("the batch of step 7", patient=sys.argv[3] == "patient")
    print("waiting", flush=True)
    time.sleep(float(sys.argv[2]))
    dog.expect("step 8")
    time.sleep(float(sys.argv[2]))
time.sleep(float(sys.argv[2]))
"""
BLOCKED = """
import sys, time
from dataclasses import dataclass, replace
from pathlib import Path
from research.core.sharding import MeshSpec
from research.data.pipeline import TextSource
from research.train import loop
from tests import tiny

@dataclass(frozen=True)
class Blocking(TextSource):
    def start(self, context):
        stream = super().start(context)
        draw = stream.next
        stream.next = lambda policy, step: time.sleep(600) if step == 3 else draw(policy, step)
        return stream

source = Blocking(**{name: getattr(tiny.experiment().source, name) for name in TextSource.__dataclass_fields__})
options = loop.Options(cache_dir=Path(sys.argv[1]), stall_minutes=2.5 / 60)
loop.run(tiny.experiment(mesh=MeshSpec(data=1), source=source, evals=()), Path(sys.argv[2]), options)
"""


STUCK = """
import sys, time
from pathlib import Path
from research.core.sharding import MeshSpec
from research.train import loop
from tests import tiny

loop.first_state = lambda *given: time.sleep(600)  # a file system that hangs while a checkpoint is read
options = loop.Options(cache_dir=Path(sys.argv[1]), stall_minutes=0.5 / 60)
loop.run(tiny.experiment(mesh=MeshSpec(data=1), evals=()), Path(sys.argv[2]), options)
"""


def python(script, *words):
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("limit", "sleep", "kind", "code"),
    [
        (0.5, 60, "brisk", 3),
        (0.6, 0.4, "brisk", 0),
        (0.6, 1.0, "brisk", 3),
        (0, 0.1, "brisk", 0),
        (0.2, 60, "patient", 3),
    ],
)
def test_it_ends_a_process_that_expects_nothing_new_for_too_long(limit, sleep, kind, code):
    begun = time.monotonic()
    process = python(IDLE, limit, sleep, kind)
    _, told = process.communicate(timeout=50)
    assert process.returncode == code, told
    if code:
        assert "tiny made no progress for" in told and "it waited for the batch of step 7." in told
        assert time.monotonic() - begun >= limit * (4 if kind == "patient" else 1)


def test_a_process_that_was_stopped_has_not_hung():
    process = python(IDLE, 1.5, 0.5, "brisk")
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=50)
    assert process.returncode == 0, told


@pytest.mark.slow
def test_a_run_whose_stream_blocks_names_the_batch_it_waited_for(tmp_path, cache_dir):
    process = python(BLOCKED, cache_dir, tmp_path / "run")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 3, told
    assert "tiny made no progress for 0.0417 minutes and was ended: it waited for the batch of step 4." in told


@pytest.mark.slow
def test_a_run_that_cannot_read_its_checkpoint_ends(tmp_path, cache_dir):
    process = python(STUCK, cache_dir, tmp_path / "run")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 3, told
    assert "tiny made no progress for 0.0333 minutes and was ended: it waited for the start." in told
