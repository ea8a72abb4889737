# SPDX-License-Identifier: Apache-2.0
"""Runs, checkpoints and journals in a bucket (an emulator on loopback): the same numbers as on this machine's disk."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from launch import store
from research.core.errors import UserError
from research.train import metrics
from tests.conftest import ROOT
from tests.launch.clouds import Cloud, lab
from tests.launch.test_tpu_vm import MACHINE

STUDY = "tests/launch/tiny_study.py"


@pytest.fixture(scope="module")
def bucket():
    """The environment of a process that uses the bucket gs://lab-test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "launch" / "bucket.py"), str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **quiet)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    at = f"http://127.0.0.1:{port}"
    yield {
        "STORAGE_EMULATOR_HOST": at, "TENSORSTORE_GCS_HTTP_URL": at, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }  # fmt: skip
    server.kill()
    server.wait()


def run(runs, environment, *words, code=0):
    command = [sys.executable, "-m", "launch.cli", "--runs", str(runs), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def python(environment, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_of_several_that_create_an_object_one_is_told_so(bucket):
    code = (
        "from launch import store; p = store.place('gs://lab-test/j/x.json');"
        "print(store.create(p, '1'), store.create(p, '2'), p.read_text());"
        "store.write(p, '{}'); print(store.read_json(p), store.names(p.parent), store.read(p.parent / 'none'))"
    )
    assert python(bucket, code).splitlines() == ["True False 1", "{} ['x.json'] None"]


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """Its size is asked before its bytes, so that a reading may end in the middle; a file here is whole."""
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    reads = []

    def read(path, mend):
        reads.append(path)
        if len(reads) == 1 or "broken" in str(path):
            raise UserError(f"{path} is damaged: {mend}.")
        return {"state": "running"}

    monkeypatch.setattr(store.files, "read_json", read)
    assert store.read_json("gs://bucket/host-0.json") == {"state": "running"} and len(reads) == 2
    for path, times in (("gs://bucket/broken.json", 4), (tmp_path / "broken.json", 1)):
        reads.clear()
        with pytest.raises(UserError, match="is damaged"):
            store.read_json(path)
        assert len(reads) == times


def test_other_schemes_are_refused_in_one_sentence(capsys):
    from launch.cli import main

    for name in ("s3://bucket/runs", "gs://"):
        assert main(["--runs", name, "list", STUDY]) == 2
        assert "no folder that can be used" in capsys.readouterr().err


@pytest.fixture
def study(tmp_path):
    """A study of two short runs with few checkpoints: the emulator takes two seconds for each."""
    path = tmp_path / "short.py"
    path.write_text(
        "from tests import tiny\nfrom research.train.experiment import CheckpointPolicy\n"
        "def sweep():\n    return {'tiny': tiny.experiment(steps=24, checkpoint=CheckpointPolicy(every=8)),"
        " 'other': tiny.experiment(steps=4, checkpoint=CheckpointPolicy(every=0))}\n"
    )
    return str(path)


def losses(directory):
    return [{k: v for k, v in line.items() if k not in metrics.CLOCK_FIELDS} for line in metrics.read(directory)]


def test_runs_in_a_bucket(bucket, study, tmp_path):
    here, remote = {**bucket, "LAB_CACHE": str(tmp_path / "cache")}, "gs://lab-test/short"
    run(remote, here, "run", study, "--only", "other")
    listed = run(remote, here, "list", study).stdout
    assert "finished" in listed and "missing" in listed
    sampled = run(remote, here, "sample", f"{remote}/short/other", "--prompt", "ab", "--tokens", "4").stdout
    assert sampled.startswith("ab")


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_begun_anew_elsewhere_has_the_same_metrics(bucket, study, tmp_path):
    """Elsewhere: on a machine whose own folders are empty."""
    here, remote = {**bucket, "LAB_CACHE": str(tmp_path / "cache")}, "gs://lab-test/runs"
    run(tmp_path / "runs", here, "run", study, "--only", "tiny")
    command = [sys.executable, "-m", "launch.cli", "--runs", remote, "run", study, "--only", "tiny"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | here, stderr=subprocess.DEVNULL)
    mirrors, until = tmp_path / "cache" / "mirrors", time.monotonic() + 60
    while time.monotonic() < until:
        found = list(mirrors.glob("*/tiny/metrics.jsonl"))
        if found and len(found[0].read_bytes().splitlines()) > 18:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(mirrors)
    run(remote, here, "run", study, "--only", "tiny")
    (again,) = mirrors.glob("*/tiny")
    assert losses(again) == losses(tmp_path / "runs" / "short" / "tiny")
    starts = [json.loads(line)["from_step"] for line in (again / "provenance.jsonl").read_text().splitlines()]
    assert starts == [0, 8] or starts == [0, 16]


@pytest.mark.slow
def test_slices_of_two_hosts_write_one_checkpoint_to_a_bucket(bucket, tmp_path, cache_dir):
    """The whole road over gs://: the journal, the code, the hosts' reports, a sharded checkpoint, the analysis."""
    environment = MACHINE | bucket | {"XLA_FLAGS": MACHINE["XLA_FLAGS"], "LAB_CACHE": str(cache_dir)}
    cloud = Cloud(tmp_path / "cloud", hosts=2, environment=environment)
    study = tmp_path / "two.py"
    study.write_text(
        "from tests.launch.cloud_study import sweep as all_runs\n"
        "def sweep():\n    return {'run0': all_runs()['run0']}\n"
        "def analyze(runs, out):\n    (out / 'said.txt').write_text(f'{next(iter(runs)).loss:.3f}')\n"
    )
    done = lab(
        cloud, "gs://lab-test/two", "sweep", str(study), "--on", "tpu-vm", "--tpu", "v5p-16", "--zones", "z", "--poll",
        "0.3", "--python", sys.executable, **{**bucket, "LAB_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0 and "1 finished" in done.stderr, done.stderr + cloud.console()
    cloud.wait_until_empty()
    assert "run0: finished (" not in done.stderr and "host 0" not in done.stderr  # the hosts' own word, not a guess
    code = (
        "from launch import store; p = store.place('gs://lab-test/two/two'); print((p / 'said.txt').read_text());"
        "tasks = p / '.sweep' / 'tasks'; print(store.names(tasks / store.names(tasks)[0]));"
        "print(store.names(p / 'run0' / 'checkpoints'));"
        "from launch.journal import Journal; (task,) = Journal(p).tasks(); end = task.outcomes['run0'];"
        "print(end.outcome, end.code, task.chip_hours > 0)"
    )
    told = python(bucket, code)
    assert (
        told.splitlines()[-1] == "finished 0 True"
        and "'30', '40'" in told
        and "host-1.json" in told
        and "run0.host-0.log" in told
    ), told
