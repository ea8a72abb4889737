# SPDX-License-Identifier: Apache-2.0
"""``--on sky``: what is translated, that SkyPilot itself takes it, and what its states become."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from launch import skypilot
from launch.controller import Controller, Wanted
from launch.executor import Unreachable
from launch.journal import Journal, Patience, Task
from launch.skypilot import Sky
from launch.tpu_vm import Settings
from research.core.chips import CHIPS, slice_of
from tests.conftest import ROOT


def executor(journal, **changes):
    settings = Settings(slice_of("v5e-16"), ("us-west4-a",), **changes)
    words = ["-m", "launch.cli", "--runs", "gs://b/runs", "run", "study.py", "--set", "model.remat=full"]
    return Sky(journal, settings, "gs://b/runs/study/.sweep/code-0.tar.gz", words, retries=2)


TASK = Task(name="lab-01234567-1", number=1, on="sky", runs=("big one",))
SLICES = [
    f"{chip.name}-{(count if chip.cores == 1 else 2 * count)}" for chip in CHIPS.values() for count in chip.shapes
]


def test_a_run_as_a_task(tmp_path):
    made = executor(Journal(tmp_path)).job(TASK)
    assert made["name"] == TASK.name and made["num_nodes"] == 1
    resources = made["resources"]
    assert resources["accelerators"] == {"tpu-v5litepod-16": 1} and resources["use_spot"] is True
    assert resources["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite", "tpu_vm": True}
    assert resources["infra"] == "gcp/us-west4/us-west4-a"
    recovery = resources["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 2 and {3, 4, 130, 143} == set(recovery["recover_on_exit_codes"])
    assert made["run"].endswith("run study.py --set model.remat=full --only 'big one'")
    assert list(made["file_mounts"].values()) == ["gs://b/runs/study/.sweep/code-0.tar.gz"]
    assert "-c constraints.txt" in made["setup"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not here: make sky")
def test_skypilot_takes_every_task(tmp_path):
    """All slices, ways of paying and numbers of zones, by SkyPilot's own loader, in a home folder of its own."""
    files = []
    for number, name in enumerate(SLICES):
        for zones in ((), ("us-west4-a",), ("us-west4-a", "us-central1-a")):
            for provisioning in ("spot", "on-demand"):
                settings = Settings(slice_of(name), zones, provisioning=provisioning)
                made = replace(executor(Journal(tmp_path)), settings=settings)
                files.append(tmp_path / f"{number}-{len(zones)}-{provisioning}.yaml")
                files[-1].write_text(made.preview(TASK))
    script = (
        "import sys, sky\n"
        "for path in sys.argv[1:]:\n"
        "    task = sky.Task.from_yaml(path)\n"
        "    for one in task.resources:\n"
        "        (name, count), = one.accelerators.items()\n"
        "        print(path, name, count, one.use_spot, one.accelerator_args['runtime_version'], one.zone)\n"
    )
    environment = os.environ | {
        "HOME": str(tmp_path), "SKYPILOT_DISABLE_LOCAL_API_SERVER": "1", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"
    }  # fmt: skip
    command = [sys.executable, "-c", script, *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert {line[0] for line in lines} == set(map(str, files))
    for path, name, count, spot, runtime, zone in lines:
        loaded = yaml.safe_load(Path(path).read_text())
        assert (name, count) == (next(iter(loaded["resources"]["accelerators"])), "1")
        assert spot == str(loaded["resources"]["use_spot"])
        assert runtime == loaded["resources"]["accelerator_args"]["runtime_version"]
        assert zone in ("None", "us-west4-a", "us-central1-a")


# --- its states ---------------------------------------------------------------------------------


@dataclass
class Record:
    job_id: int
    job_name: str
    status: str
    failure_reason: str = ""
    recovery_count: int = 0


class Server:
    """Stands for SkyPilot's SDK and its server: jobs by name, moved on by the test."""

    def __init__(self):
        self.records: list[Record] = []
        self.down: Exception | None = None
        self.Task = types.SimpleNamespace(from_yaml_config=lambda config: dict(config))
        self.jobs = self

    def get(self, answer):
        if self.down is not None:
            raise self.down
        return answer

    def launch(self, task, name):
        assert task["name"] == name and all(record.job_name != name for record in self.records), "launched twice"
        self.records.append(Record(len(self.records) + 1, name, "PENDING"))

    def queue_v2(self, refresh, name_match, fields, all_users):
        return [record for record in self.records if name_match in record.job_name], len(self.records), {}, 0

    def cancel(self, name):
        self.move(name, "CANCELLED")

    def tail_logs(self, name, follow, output_stream):
        print(f"what {name} said", file=output_stream)

    def move(self, name, status, **more):
        for record in self.records:
            if record.job_name == name:
                vars(record).update(status=status, **more)


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(skypilot, "library", lambda: made)
    monkeypatch.setattr(skypilot, "ASKED_EVERY", 0.0)
    return made


def controller(tmp_path, results, names):
    journal = Journal(tmp_path)
    sweep = journal.begin({"runs": list(names)})
    runs = [Wanted(name, 1.0, lambda name=name: name in results) for name in names]
    return Controller(journal, sweep, executor(journal), runs, 10, Patience(backoff=0.0), lambda text: None)


def test_states_of_jobs_become_states_of_runs(server, tmp_path):
    results: set[str] = set()
    sweep = controller(tmp_path, results, ["a", "b", "c"])
    assert sweep.step() and [record.status for record in server.records] == ["PENDING"] * 3
    first, second, third = (record.job_name for record in server.records)
    server.move(first, "RUNNING")
    server.move(second, "RECOVERING", recovery_count=2)
    sweep.step()
    known = sweep.states()
    assert known["a"].state == "running" and known["b"].state in ("assigned", "running")
    server.move(first, "SUCCEEDED")
    results.add("a")
    server.move(second, "FAILED", failure_reason="the user's program failed")
    server.move(third, "FAILED_NO_RESOURCE")
    sweep.step()
    known = sweep.states()
    assert known["a"].state == "finished"
    assert known["b"].state == "failed" and "the user's program" in known["b"].detail  # SkyPilot has retried it
    assert len(server.records) == 4 and known["c"].counts["declined"] == 1  # asked for again
    server.move(server.records[-1].job_name, "SUCCEEDED")
    results.add("c")
    while sweep.step():
        pass
    assert {run.state for run in sweep.states().values()} == {"finished", "failed"}
    (log,) = sweep.executor.logs(sweep.journal.tasks()[0], "a")
    assert log.read_text() == f"what {first} said\n"


def test_a_submitting_process_that_died_launches_nothing_twice(server, tmp_path):
    sweep = controller(tmp_path, set(), ["a"])
    task = sweep.journal.intend(sweep.sweep, [], on="sky", runs=("a",), place="sky", chips=16)
    sweep.executor.submit(task)  # and then it dies
    controller(tmp_path, set(), ["a"]).step()
    assert len(server.records) == 1


def test_without_a_server_nothing_is_known_and_the_user_is_told(server, tmp_path):
    sweep = controller(tmp_path, set(), ["a"])
    sweep.step()
    server.down = RuntimeError("No SkyPilot API server endpoint is configured")
    with pytest.raises(Unreachable, match="No SkyPilot API server"):
        sweep.executor.poll(sweep.journal.tasks()[0])
    assert sweep.step()  # it waits
    server.down = None
    sweep.journal.cancel(["*"])
    for _ in range(3):
        with contextlib.suppress(StopIteration):
            sweep.step()
    assert server.records[0].status == "CANCELLED" and sweep.states()["a"].state == "cancelled"
