# SPDX-License-Identifier: Apache-2.0
"""``lab`` on two hosts of four devices against one of eight: the same losses and parameters, the same decisions, and
checkpoints that go from one to the other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from research.core.sharding import MeshSpec
from research.core.tree import named_leaves
from research.core.types import Precision
from research.train import checkpoint, loop, metrics
from tests import tiny
from tests.conftest import ROOT
from tests.launch import hosts_study
from tests.train.test_loop import interrupted_after

STUDY = str(ROOT / "tests" / "launch" / "hosts_study.py")


def start(runs, cache, *words, devices=4, different=()):
    """The same ``lab`` command on two hosts. runs, cache: one folder, or one for each host. different: words that only
    the second one gets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # quick compilation
        "PYTHONPATH": str(ROOT),
    }
    hosts = []
    for host in range(2):
        folder, environment["LAB_CACHE"] = (str(x[host] if isinstance(x, tuple) else x) for x in (runs, cache))
        where = ("--coordinator", f"localhost:{port}", "--hosts", "2", "--host", str(host))
        words_here = (*words, *where, *(different if host else ()))
        command = [sys.executable, "-m", "launch.cli", "--runs", folder, *words_here]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        hosts.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    return hosts


def finish(hosts, codes=(0, 0)):
    """What each of them printed."""
    try:
        printed = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert tuple(host.returncode for host in hosts) == codes, "\n".join(printed)
    return printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache_dir):
    """Runs of this process with its eight devices, made when asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("alone")
            loop.run(hosts_study.sweep()[name], made[name], loop.Options(cache_dir=cache_dir))
        return made[name]

    return run


def assert_same_losses(directory, other):
    found, wanted = ([line for line in metrics.read(d) if "loss" in line] for d in (directory, other))
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in wanted], rtol=1e-6)
    held_out = [metrics.read(d)[-1]["validation/cross_entropy"] for d in (directory, other)]
    np.testing.assert_allclose(*held_out, rtol=1e-6)


def params(directory, model):
    shapes = model.shapes(Precision())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return named_leaves(checkpoint.load_params(directory, shapes, jax.tree.map(lambda _: one, shapes)))


def assert_same_params(directory, other, model=tiny.MODEL):
    found, wanted = params(directory, model), params(other, model)
    for name in wanted:
        off = np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
        assert off < 1e-5, (name, off)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache_dir):
    """A sweep on two hosts over all meshes, after a run that diverges: its folder, and what each host printed."""
    runs = tmp_path_factory.mktemp("swept")
    printed = finish(start(runs, cache_dir, "sweep", STUDY + ":with_a_wild_one"), codes=(1, 1))
    return runs / "hosts_study-with_a_wild_one", printed


@pytest.mark.slow
@pytest.mark.parametrize("name", hosts_study.MESHES)
def test_two_hosts_compute_what_one_does(alone, swept, name):
    directory = swept[0] / name
    assert_same_losses(directory, alone(name))
    assert_same_params(directory, alone(name), hosts_study.sweep()[name].model)
    assert json.loads((directory / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_one_host_writes_and_speaks(swept):
    directory, printed = swept
    (line,) = (directory / "mixed" / "provenance.jsonl").read_text().splitlines()
    assert json.loads(line)["processes"] == 2 and len(list((directory / "mixed" / "tensorboard").iterdir())) == 1
    assert "4 of 5 runs finished" in printed[0] and "[1/5] wild: The " in printed[0] and "[1/5]" not in printed[1]
    assert json.loads((directory / "wild" / "failure.json").read_text())["status"] == "diverged"


@pytest.mark.slow
def test_a_signal_to_one_host_makes_both_save_and_one_goes_on(tmp_path, cache_dir):
    directory = tmp_path / "hosts_study-long" / "mixed"
    hosts = start(tmp_path, cache_dir, "run", STUDY + ":long", "--only", "mixed")
    while not any(line["step"] >= 5 for line in metrics.read(directory)) and hosts[0].poll() is None:
        time.sleep(0.01)
    hosts[1].send_signal(signal.SIGTERM)
    printed = finish(hosts, codes=(128 + signal.SIGTERM,) * 2)
    (*_, saved) = checkpoint.steps(directory)
    assert all(f"it is saved at step {saved};" in text for text in printed) and 5 <= saved < 120
    experiment, options = hosts_study.long()["mixed"], loop.Options(cache_dir=cache_dir)
    loop.run(replace(experiment, mesh=MeshSpec(data=1, fsdp=4, tensor=2)), directory, options)
    loop.run(experiment, tmp_path / "alone", options)
    assert_same_losses(directory, tmp_path / "alone")


@pytest.mark.slow
def test_two_hosts_go_on_where_one_stopped(alone, tmp_path, cache_dir):
    directory = tmp_path / "hosts_study" / "mixed"
    interrupted_after(hosts_study.sweep()["data"], directory, cache_dir, step=4)
    stopped = checkpoint.steps(directory)[-1]
    finish(start(tmp_path, cache_dir, "run", STUDY, "--only", "mixed"))
    starts = [json.loads(line)["from_step"] for line in (directory / "provenance.jsonl").read_text().splitlines()]
    assert starts == [0, stopped] and 0 < stopped < 12
    assert_same_losses(directory, alone("mixed"))
    assert_same_params(directory, alone("mixed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("different", "words"),
    [
        (("--set", "optimizer.peak=0.2"), "Host 1: its experiment is not that of host 0 (optimizer.peak: "),
        (("--set", "source.corpus.seed=nothing"), "Host 1: --set source.corpus.seed: 'nothing' is not a whole number"),
    ],
)
def test_hosts_that_do_not_agree_end_with_one_sentence(tmp_path, cache_dir, different, words):
    printed = finish(start(tmp_path, cache_dir, "run", STUDY, "--only", "data", different=different), codes=(2, 2))
    assert all(words in text for text in printed), printed


@pytest.mark.slow
def test_a_folder_of_runs_that_is_not_shared_is_refused(tmp_path, cache_dir):
    folders = (tmp_path / "a", tmp_path / "b")  # caches need not be: each host fills its own
    printed = finish(start(folders, folders, "run", STUDY, "--only", "mixed"), codes=(2, 2))
    assert all("is not the same folder on all 2 hosts" in text for text in printed), printed
    tokens = [{path.relative_to(f) for path in f.rglob("tokens/*")} for f in folders]
    assert tokens[0] == tokens[1] != set()


@pytest.mark.verify
def test_a_host_that_dies_ends_the_other(tmp_path, cache_dir):
    """Which of the two tells depends on where the other stands: the connection that a collective waits on, at once, or
    JAX's own heartbeat, within two minutes."""
    hosts = start(tmp_path, cache_dir, "run", STUDY + ":long", "--only", "mixed")
    while not metrics.read(tmp_path / "hosts_study-long" / "mixed") and hosts[0].poll() is None:
        time.sleep(0.01)
    hosts[1].kill()
    hosts[1].wait()
    try:
        told = hosts[0].communicate(timeout=150)[0]
    finally:
        hosts[0].kill()
    ends = {1: "Connection closed by peer", -signal.SIGABRT: "stopped sending heartbeats"}
    assert ends.get(hosts[0].returncode, "no such end") in told, (hosts[0].returncode, told)
