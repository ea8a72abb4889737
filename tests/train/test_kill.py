# SPDX-License-Identifier: Apache-2.0
"""A run killed with SIGKILL and started again gives bit for bit the metrics of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from research.train import metrics
from tests.conftest import ROOT
from tests.train import events

STUDY = ROOT / "tests" / "launch" / "tiny_study.py"


def command(runs, cache, *words):
    """``lab`` with these words, or the run ``tiny``, as a process."""
    environment = {**os.environ, "LAB_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = ""  # one device, as a user's machine has
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # quick compilation
    words = words or ("run", str(STUDY), "--only", "tiny")
    arguments = [sys.executable, "-m", "launch.cli", "--runs", str(runs), *words]
    return subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


def without_clock(directory):
    return [{k: v for k, v in line.items() if k not in metrics.CLOCK_FIELDS} for line in metrics.read(directory)]


def kill_at(process, directory, step):
    """SIGKILL once the run has written the line of ``step`` (or at once where ``step`` is 0)."""
    deadline = time.monotonic() + 120
    while step and process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read(directory)
        if lines and lines[-1]["step"] >= step:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cache, runs = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("runs")
    finish(command(runs, cache))
    return cache, without_clock(runs / "tiny_study" / "tiny")


def storm(undisturbed, runs, points):
    cache, wanted = undisturbed
    directory = runs / "tiny_study" / "tiny"
    killed = 0
    for step in points:
        process = command(runs, cache)
        kill_at(process, directory, step)
        killed += process.returncode == -signal.SIGKILL
    finish(command(runs, cache))
    assert without_clock(directory) == wanted
    starts = [json.loads(line)["from_step"] for line in (directory / "provenance.jsonl").read_text().splitlines()]
    return killed, starts


@pytest.mark.slow
def test_killed_at_several_points_it_ends_with_the_same_metrics(undisturbed, tmp_path):
    """Before the first checkpoint, while one is being written, and after it. TensorBoard holds each step once."""
    killed, starts = storm(undisturbed, tmp_path, [2, 10, 23])
    assert killed == 3
    assert starts[0] == 0 and starts[-1] > 0 and all(start % 5 == 0 for start in starts), starts
    directory = tmp_path / "tiny_study" / "tiny"
    wanted = [(name, line["step"]) for line in metrics.read(directory) for name, _ in metrics.scalars(line)]
    assert sorted((name, step) for name, step, _ in events.read(directory)) == sorted(wanted)


@pytest.mark.verify
@pytest.mark.parametrize("seed", range(5))
def test_kill_storm(undisturbed, tmp_path, seed):
    rng = random.Random(seed)
    storm(undisturbed, tmp_path, sorted(rng.randrange(30) for _ in range(8)))


@pytest.mark.slow
def test_interrupted_from_outside_it_saves_and_goes_on(undisturbed, tmp_path):
    cache, wanted = undisturbed
    directory = tmp_path / "tiny_study" / "tiny"
    process = command(tmp_path, cache)
    while process.poll() is None and not (metrics.read(directory) and metrics.read(directory)[-1]["step"] >= 7):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output.decode()
    assert b"saved at step" in output
    finish(command(tmp_path, cache))
    assert without_clock(directory) == wanted


def swept(runs, name):
    result = json.loads((runs / "tiny_study-resumed" / name / "result.json").read_text())
    return result["loss"], result["bits_per_byte"]


@pytest.mark.slow
def test_a_sweep_interrupted_in_its_second_run_goes_on_to_the_same_losses(tmp_path, undisturbed):
    cache, _ = undisturbed
    words = ("sweep", f"{STUDY}:resumed")
    finish(command(tmp_path / "whole", cache, *words))
    first, second = (tmp_path / "runs" / "tiny_study-resumed" / name for name in ("short", "long"))
    process = command(tmp_path / "runs", cache, *words)
    while process.poll() is None and not (metrics.read(second) and metrics.read(second)[-1]["step"] >= 60):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT and b"saved at step" in output, output.decode()
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    output = finish(command(tmp_path / "runs", cache, *words))
    assert "short: finished before" in output and "2 of 2 runs finished" in output
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    starts = [json.loads(line)["from_step"] for line in (second / "provenance.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and starts[0] == 0 and 60 <= starts[1] < 1000
    for name in ("short", "long"):
        assert swept(tmp_path / "runs", name) == swept(tmp_path / "whole", name)
