# SPDX-License-Identifier: Apache-2.0
"""``lab sweep --on tpu-vm`` over a stand-in for ``gcloud`` that boots real processes: whatever goes wrong on the way,
each run is done once, and nothing is left."""

import json
import sys

import pytest

from launch.journal import Journal
from research.train import metrics
from tests.launch.clouds import Cloud, lab
from tests.train import events  # noqa: F401

STUDY = "tests/launch/cloud_study.py"
MACHINE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}
ON = ("--on", "tpu-vm", "--tpu", "v5p-16", "--zones", "zone-a,zone-b,zone-c", "--python", sys.executable,
      "--poll", "0.3", "--backoff", "0.5")  # fmt: skip


def losses(directory):
    return [{k: v for k, v in line.items() if k not in metrics.CLOCK_FIELDS} for line in metrics.read(directory)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("undisturbed")
    cloud = Cloud(folder / "cloud", hosts=2, environment=MACHINE | {"LAB_CACHE": str(cache_dir)})
    done = lab(
        cloud, folder / "runs", "sweep", STUDY, *ON, "--retries", "0", "--parallel", "2", LAB_CACHE=str(cache_dir)
    )
    cloud.wait_until_empty()
    assert done.returncode == 1 and "3 finished, 1 failed" in done.stderr, done.stderr + cloud.console()
    return folder / "runs" / "cloud_study"


@pytest.mark.slow
def test_everything_goes_wrong_and_every_run_is_done_once(undisturbed, tmp_path, cache_dir):
    cloud = Cloud(tmp_path / "cloud", hosts=2, environment=MACHINE | {"LAB_CACHE": str(cache_dir)})
    runs = tmp_path / "runs"
    first = runs / "cloud_study" / "run0" / "metrics.jsonl"
    cloud.disturb(
        {"do": "preempt", "serial": 1, "file": str(first), "step": 20},  # in the midst of its first run
        {"do": "suspend", "serial": 2},
        {"do": "missing host", "serial": 3, "host": 1},
        {"do": "timeout"},
        {"do": "auth"},
    )
    done = lab(
        cloud, runs, "sweep", STUDY, *ON, "--parallel", "2", "--host-timeout", "10", "--gcloud-timeout", "3",
        LAB_CACHE=str(cache_dir),
    )  # fmt: skip
    told = done.stderr + cloud.console()
    assert done.returncode == 1 and "3 finished, 1 failed" in done.stderr, told
    assert cloud.left_to_disturb == [], told  # all of it has happened
    for name in ("run0", "run1", "run2"):
        assert losses(runs / "cloud_study" / name) == losses(undisturbed / name), told
    assert "bug failed: " in done.stderr and "KeyError: 'missing'" in done.stderr
    assert "gcloud did not answer within 3 s" in done.stderr and "Reauthentication failed" in done.stderr
    assert "tester@example.com" not in done.stderr
    cloud.wait_until_empty()
    tasks = Journal(runs / "cloud_study").tasks()
    assert not any(task.live for task in tasks)
    ends = [(run, end.outcome) for task in tasks for run, end in task.outcomes.items()]
    for name in ("run0", "run1", "run2"):
        assert ends.count((name, "finished")) == 1
    assert ends.count(("bug", "crashed")) == 2  # one retry
    outcomes = [outcome for _, outcome in ends]
    assert outcomes.count("preempted") == 2 and outcomes.count("unplaced") >= 1
    assert len({task.place for task in tasks}) > 1  # the next zone
    starts = [
        json.loads(line)["from_step"] for line in (runs / "cloud_study/run0/provenance.jsonl").read_text().splitlines()
    ]
    assert starts[0] == 0 and len(starts) == 2 and starts[1] in (10, 20)  # on from its last checkpoint
