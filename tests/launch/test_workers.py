# SPDX-License-Identifier: Apache-2.0
"""``lab sweep --on local``: worker processes that outlive whoever began them."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from launch import workers
from launch.controller import Controller, Wanted
from launch.journal import Journal, Patience
from launch.workers import Workers
from tests.conftest import ROOT
from tests.launch import standin
from tests.launch.clouds import Cloud

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SUBMITTER = str(ROOT / "tests" / "launch" / "submitter.py")


def submit(kind, runs, names, environment=ENVIRONMENT):
    command = [sys.executable, SUBMITTER, kind, str(runs), "0.2", *names]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_done(runs, names, told=""):
    """Each good run is done, with every step once, by one process at a time; nothing runs any more."""
    tasks = Journal(runs).tasks()
    assert not any(task.live for task in tasks), told
    ends = [(run, end.outcome) for task in tasks for run, end in task.outcomes.items()]
    for name in names:
        assert not (runs / name / "twice").exists(), told
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        if name.endswith("-bug"):
            assert not (runs / name / "result.json").exists() and ends.count((name, "crashed")) == 2, told
            assert "a bug of its own" in tasks[-1].outcomes.get(name, next(
                task.outcomes[name] for task in reversed(tasks) if name in task.outcomes)).detail  # fmt: skip
        elif name.endswith("-refused"):
            assert ends.count((name, "refused")) == 1 and "a fish" in str(tasks), told
        else:
            assert (runs / name / "result.json").exists(), told
            assert lines == [{"step": n, "loss": 1.0 / n} for n in range(1, standin.STEPS + 1)], told
            assert ends.count((name, "finished")) == 1, (ends, told)


def test_one_runs_crash_does_not_end_the_sweep(tmp_path):
    names = ["a", "b-bug", "c-refused", "d"]
    process = submit("local", tmp_path, names)
    told, _ = process.communicate(timeout=60)
    assert "2 finished, 2 failed" in told, told
    check_done(tmp_path, names, told)


def test_a_worker_outlives_its_submitter_and_is_found_again(tmp_path):
    first = submit("local", tmp_path, ["a"])
    until = time.monotonic() + 30
    while not (tmp_path / "a" / "starts-0").exists() and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    told, _ = submit("local", tmp_path, ["a"]).communicate(timeout=60)
    assert "1 finished" in told and (tmp_path / "a" / "starts-0").read_text() == "0\n", told
    check_done(tmp_path, ["a"], told)
    assert len(Journal(tmp_path).tasks()) == 1


def test_a_sweep_in_this_process_keeps_away_from_what_an_executor_has_in_hand(tmp_path, capsys):
    from launch.cli import main

    journal = Journal(tmp_path / "tiny_study")
    journal.intend(journal.begin({"runs": ["tiny"]}), [], on="tpu-vm", runs=("tiny",))
    assert main(["--runs", str(tmp_path), "sweep", "tests/launch/tiny_study.py"]) == 2
    assert "has tiny in hand: go on with --on tpu-vm" in capsys.readouterr().err


def test_what_is_cancelled_saves_and_leaves_and_goes_on_when_asked_for_again(tmp_path):
    journal = Journal(tmp_path)
    sweep = journal.begin({"runs": ["a"]})
    executor = Workers(journal, [sys.executable, submitter_standin(), str(tmp_path)], 1)
    wanted = [Wanted("a", 1.0, (tmp_path / "a" / "result.json").exists)]
    said: list[str] = []
    controller = Controller(journal, sweep, executor, wanted, 1, Patience(backoff=0.0), said.append)
    until = time.monotonic() + 30
    while not (tmp_path / "a" / "starts-0").exists() and time.monotonic() < until:
        controller.step()
        time.sleep(0.02)
    journal.cancel(["a"])
    while controller.step():
        time.sleep(0.02)
    assert controller.states()["a"].state == "cancelled"
    journal.resume()
    while controller.step():
        time.sleep(0.02)
    assert controller.states()["a"].state == "finished"
    starts = [int(line) for line in (tmp_path / "a" / "starts-0").read_text().split()]
    assert len(starts) == 2 and starts[1] > 0  # it had saved


def submitter_standin():
    return str(ROOT / "tests" / "launch" / "standin.py")


def test_cores_and_accelerators_are_shared_out(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "cores", lambda: [0, 1, 2, 3, 6])
    pinned = []
    monkeypatch.setattr(workers.os, "sched_setaffinity", lambda pid, mine: pinned.append(list(mine)))
    for index in range(2):
        workers.pin(index, 2)
    workers.pin(0, 1)  # alone: all
    workers.pin(0, 9)  # more workers than cores: none is held to one
    assert pinned == [[0, 2, 6], [1, 3]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert [workers.pinned(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["4,7", "5"]
    assert workers.pinned(0, 1) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(workers, "tpu_chips", lambda: ["a", "b", "c", "d"])
    second = workers.pinned(1, 2)
    assert (second["TPU_VISIBLE_CHIPS"], second["TPU_CHIPS_PER_PROCESS_BOUNDS"]) == ("2,3", "1,2,1")
    assert workers.pinned(2, 3)["TPU_VISIBLE_CHIPS"] == "2" and workers.pinned(0, 5) == {}


def test_the_words_of_a_failure(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nTraceback (most recent call last):\n  File x\n    a[3]\n    ~^^^\nKeyError: 3\n")
    assert workers.last_words(log) == "File x | a[3] | KeyError: 3"
    log.write_text("lab: error: The mesh is square.\n")
    assert workers.last_words(log) == "The mesh is square." and workers.last_words(tmp_path / "none") == ""


@pytest.mark.verify
@pytest.mark.parametrize("kind", ["local", "tpu-vm"])
def test_a_submitter_killed_twenty_times_comes_to_the_same_end(tmp_path, kind):
    """With preemptions besides, where there are machines to take away."""
    runs, names = tmp_path / "runs", [f"run{i}" for i in range(8)] + ["x-bug", "y-refused"]
    cloud, environment = None, ENVIRONMENT
    if kind == "tpu-vm":
        cloud = Cloud(tmp_path / "cloud", hosts=2, environment={})
        environment = cloud.environment
        begun = {"step": 10, "file": str(runs / "run0" / "metrics.jsonl")}
        cloud.disturb(
            {"do": "preempt", "serial": 1, **begun},
            {"do": "suspend", "serial": 2},
            {"do": "notice", "serial": 3, **begun, "seconds": 1.0},
            {"do": "fail", "serial": 4},
            {"do": "auth"},
        )
    chance = random.Random(5)
    for _ in range(20):
        process = submit(kind, runs, names, environment)
        time.sleep(chance.uniform(0.1, 3.0 if kind == "tpu-vm" else 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    told, _ = submit(kind, runs, names, environment).communicate(timeout=300)
    told += cloud.console() if cloud else ""
    assert "8 finished, 2 failed" in told, told
    check_done(runs, names, told)
    if cloud is not None:
        cloud.wait_until_empty()
        assert cloud.left_to_disturb == [], told


def test_one_of_the_runs_of_a_slice_is_cancelled_and_the_others_go_on(tmp_path):
    runs, cloud = tmp_path / "runs", Cloud(tmp_path / "cloud", hosts=2, environment={})
    process = submit("tpu-vm", runs, ["a", "b", "c"], cloud.environment)
    try:
        until = time.monotonic() + 40
        while not (runs / "a" / "starts-1").exists() and time.monotonic() < until:
            time.sleep(0.02)
        Journal(runs).cancel(["a"])
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    told += cloud.console()
    assert "2 finished, 1 cancelled" in told, told
    first, second = Journal(runs).tasks()
    assert first.runs == ("a", "b") and first.outcomes["b"].outcome == "finished" and second.runs == ("c",), told
    assert not (runs / "a" / "result.json").exists() and (runs / "a" / "saved-0").exists()
    cloud.wait_until_empty()
