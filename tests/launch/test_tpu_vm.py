# SPDX-License-Identifier: Apache-2.0
"""``lab sweep --on tpu-vm`` over a stand-in for ``gcloud`` that boots real processes: whatever goes wrong on the way,
each run is done once, and nothing is left."""

import json
import signal
import subprocess
import sys
import time

import pytest

from launch.journal import Journal
from research.train import metrics
from tests.conftest import ROOT
from tests.launch.clouds import Cloud, lab

STUDY = "tests/launch/cloud_study.py"
MACHINE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}
ON = ("--on", "tpu-vm", "--shared-runs", "--tpu", "v5p-16", "--zones", "zone-a,zone-b,zone-c",
      "--python", sys.executable, "--poll", "0.3", "--backoff", "0.5")  # fmt: skip


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
        cloud, runs, "sweep", STUDY, *ON, "--parallel", "2", "--host-timeout", "20", "--gcloud-timeout", "3",
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


ONE = ("--on", "tpu-vm", "--shared-runs", "--tpu", "v5p-8", "--zones", "zone-a", "--python", sys.executable,
       "--poll", "0.2", "--backoff", "0.2", "--parallel", "2")  # fmt: skip
TINY = "tests/launch/tiny_study.py:resumed"
FOLDER = "tiny_study-resumed"


@pytest.fixture
def cloud(tmp_path, cache_dir):
    made = Cloud(tmp_path / "cloud", hosts=1, environment=MACHINE | {"XLA_FLAGS": "", "LAB_CACHE": str(cache_dir)})
    made.environment["LAB_CACHE"] = str(cache_dir)
    yield made
    made.close()


@pytest.mark.slow
def test_a_notice_saves_and_the_run_goes_on_elsewhere(cloud, tmp_path):
    metrics_file = tmp_path / "runs" / FOLDER / "long" / "metrics.jsonl"
    cloud.disturb({"do": "notice", "serial": 2, "file": str(metrics_file), "step": 30, "seconds": 30})
    done = lab(cloud, tmp_path / "runs", "sweep", TINY, *ONE)
    assert done.returncode == 0 and "2 finished" in done.stderr, done.stderr + cloud.console()
    record = (tmp_path / "runs" / FOLDER / "long" / "provenance.jsonl").read_text().splitlines()
    starts = [json.loads(line)["from_step"] for line in record]
    assert len(starts) == 2 and starts[1] % 50 and cloud.left_to_disturb == []  # where it was found, not the last 50th
    assert json.loads(record[0])["commit"]  # of the checkout, though there is none on the machine
    cloud.wait_until_empty()


@pytest.mark.slow
def test_status_logs_cancel_and_gc_without_the_process_that_submitted(cloud, tmp_path):
    runs = tmp_path / "runs"
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "--runs", str(runs), "sweep", TINY, *ONE, "--budget", "100"],
        cwd=ROOT, env=cloud.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (runs / FOLDER / "long" / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    rows = json.loads(lab(cloud, runs, "status", TINY, "--json").stdout)[FOLDER]
    assert {row["name"]: row["state"] for row in rows}["long"] in ("running", "finished")
    assert "in use: long" in lab(cloud, runs, "gc").stdout
    refused = lab(cloud, runs, "cancel", FOLDER, "nobody")
    assert refused.returncode == 2 and "has no run nobody" in refused.stderr
    cancelled = lab(cloud, runs, "cancel", FOLDER, "long")
    told = cancelled.stderr
    assert cancelled.returncode == 0 and ("cancelled: long" in told or "long is finished" in told), told
    rows = json.loads(lab(cloud, runs, "status", FOLDER, "--json").stdout)[FOLDER]
    assert {row["name"]: row["state"] for row in rows}["long"] in ("cancelled", "finished")
    # what no live run owns: of a task that is over, of a number that was never begun, of another journal
    sweep = Journal(runs / FOLDER).about()["id"]
    for name in (f"lab-{sweep}-99", "lab-ffffffff-1"):
        lab_gcloud(cloud, "create", name)
    listed = lab(cloud, runs, "gc").stdout
    assert f"lab-{sweep}-99" in listed and "owned by no live run" in listed and "not below" in listed
    assert "deleted" in lab(cloud, runs, "gc", "--delete").stdout
    until = time.monotonic() + 20
    while f"lab-{sweep}-99" in cloud.requests and time.monotonic() < until:
        time.sleep(0.1)
    assert f"lab-{sweep}-99" not in cloud.requests and "lab-ffffffff-1" in cloud.requests


def lab_gcloud(cloud, verb, name):
    script = cloud.folder / "s.sh"
    script.write_text("sleep 100\n")
    words = ("compute", "tpus", "queued-resources", verb, name, "--zone", "zone-a", "--node-id", name, "--quiet")
    words += ("--accelerator-type", "v5p-8", "--runtime-version", "x", f"--metadata-from-file=startup-script={script}")
    subprocess.run([str(cloud.folder / "bin" / "gcloud"), *words], env=cloud.environment, check=True)


def test_a_dry_run_shows_all_and_sends_nothing(cloud, tmp_path):
    account = "robot@my-project.iam.gserviceaccount.com"
    done = lab(cloud, tmp_path / "runs", "sweep", TINY, *ONE, "--dry-run", "--service-account", account)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("$ gcloud compute tpus queued-resources create") == 2
        and "research/train/loop.py" in done.stdout
    )
    assert "again meta attributes/lab-config" in done.stdout and '"runs": ["short"]' in done.stdout
    assert account not in done.stdout + done.stderr
    assert cloud.commands == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--on", "tpu-vm"), "needs --tpu SLICE"),
        (("--on", "tpu-vm", "--tpu", "v5e-16"), "needs --zones"),
        (("--on", "tpu-vm", "--tpu", "v5e-17", "--zones", "z"), "no slice v5e-17"),
        (("--on", "tpu-vm", "--tpu", "v5e-16", "--zones", "z"), "needs --runs gs://BUCKET/FOLDER"),
        (("--on", "local", "--parallel", "0"), "--parallel 0 must be at least 1"),
        (("--on", "local", "--retries", "-1"), "--retries -1 must be at least 0"),
        (("--on", "local", "--budget", "1"), "--budget is in chip-hours of TPUs"),
        (("--on", "tpu-vm", "--tpu", "v5e-16", "--zones", "z", "--budget", "0"), "give chip-hours above 0"),
        (("--on", "tpu-vm", "--tpu", "v5e-16", "--zones", "west a"), "give zones with commas between"),
        (("--on", "tpu-vm", "--tpu", "v5e-16", "--zones", "z", "--valid-for", "soon"), "give a duration, such as 6h"),
        (("--dry-run",), "--dry-run means nothing by itself: give --on local or tpu-vm or sky"),
        (("--parallel", "2"), "--parallel means nothing by itself"),
        (("--on", "local", "--tpu", "v5e-4"), "--tpu means nothing with --on local"),
        (("--on", "sky", "--tpu", "v5e-16"), "needs --runs gs://"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, capsys):
    from launch.cli import main

    assert main(["--runs", str(tmp_path / "runs"), "sweep", TINY, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and len(said) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [("status",), ("status", "nothing"), ("logs", "nothing", "x"), ("cancel", "nothing")])
def test_without_a_journal_it_is_said_what_begins_one(words, tmp_path, capsys):
    from launch.cli import main

    assert main(["--runs", str(tmp_path), *words]) == 2
    assert "lab sweep STUDY --on ... begins one" in capsys.readouterr().err


@pytest.mark.slow
def test_an_install_that_fails_is_told_and_the_slice_given_back(cloud, tmp_path):
    words = [word if word != sys.executable else "/no/such/python" for word in ONE]
    done = lab(cloud, tmp_path / "runs", "sweep", TINY, *words, "--parallel", "1", "--backoff", "0")
    assert done.returncode == 1 and "the startup script failed" in done.stderr, done.stderr + cloud.console()
    assert "/no/such/python" in done.stderr
    cloud.wait_until_empty()
