# SPDX-License-Identifier: Apache-2.0
"""Hosts that meet before JAX starts: one sentence on each of those that came when one does not."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch import distributed
from launch.distributed import Hosts
from research.core.errors import UserError
from tests.conftest import ROOT

VARIABLES = [variable for _, variable in distributed.OPTIONS.values()]


@pytest.fixture
def address(monkeypatch):
    for name in (*VARIABLES, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def meet(*hosts, timeout=20.0, delay=0.0):
    """What the meeting says to each of these hosts: None, or a sentence."""

    def one(position, host):
        time.sleep(delay * position)
        try:
            return distributed.meet(host, timeout)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(one, range(len(hosts)), hosts))


def test_all_meet_in_any_order(address):
    assert meet(*(Hosts(address, 5, index) for index in (3, 0, 4, 1, 2)), delay=0.05) == [None] * 5


def test_those_that_came_are_told_who_did_not(address):
    hosts = [Hosts(address, 4, index, names=("a", "b", "c", "d")) for index in (0, 2)]
    sentences = meet(*hosts, timeout=1.0)
    assert sentences[0] == sentences[1] and "host 1 (b), host 3 (d)" in sentences[0]
    assert "2 of 4 hosts did not come" in sentences[0] and "within 1 s" in sentences[0]


def test_no_host_0(address):
    (sentence,) = meet(Hosts(address, 2, 1), timeout=0.5)
    assert f"Host 0 at {address} did not answer host 1 ({socket.gethostname()}) within 0.5 s" in sentence


def test_one_index_twice(address):
    for sentence in meet(Hosts(address, 3, 0), Hosts(address, 3, 1), Hosts(address, 3, 1)):
        assert "Two processes came as host 1 of 3" in sentence


def test_host_0_twice(address):
    sentences = meet(Hosts(address, 2, 0), Hosts(address, 2, 0), timeout=1.0)
    assert sum("cannot listen" in sentence for sentence in sentences) == 1


def test_another_number_of_hosts(address):
    for sentence in meet(Hosts(address, 3, 0), Hosts(address, 4, 1)):
        assert "Host 1" in sentence and "one of 4 hosts and host 0" in sentence and "one of 3" in sentence


def test_strangers_and_hosts_that_start_again_are_no_trouble(address):
    said = []

    def others():
        time.sleep(0.3)
        place = ("localhost", int(address.partition(":")[2]))
        with socket.create_connection(place), socket.create_connection(place) as scanner:
            scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with socket.create_connection(place) as died:
                died.sendall(b'{"host": 1, "hosts": 3, "name": "died"}\n')
                time.sleep(0.2)
            said.extend(meet(Hosts(address, 3, 1), Hosts(address, 3, 2), delay=0.2))

    thread = threading.Thread(target=others)
    thread.start()
    said += meet(Hosts(address, 3, 0))
    thread.join()
    assert said == [None] * 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:80", 2, None), r"give --host I \(or \$JAX_PROCESS_ID\) too"),
        ((None, None, 1), r"give --coordinator HOST:PORT .* and --hosts N"),
        (("localhost", 2, 1), "as HOST:PORT"),
        (("localhost:80", 2, 2), "host 2 of 2: --host counts from 0 to 1"),
    ],
)
def test_half_an_answer_is_refused(address, given, words):
    with pytest.raises(UserError, match=words):
        distributed.find(*given)


def test_who_the_hosts_are(address, monkeypatch):
    assert distributed.find() is None and distributed.find(hosts=1) is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    for variable, value in zip(VARIABLES, (address, "2", "1"), strict=True):
        monkeypatch.setenv(variable, value)
    assert distributed.find() == Hosts(address, 2, 1, names=("a", "b"))
    assert distributed.find(host=0) == Hosts(address, 2, 0, names=("a", "b"))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="give whole numbers"):
        distributed.find()


def test_the_hosts_of_a_slurm_step(address, monkeypatch):
    step = {"JOB_ID": 7, "STEP_NODELIST": "node[3-4]", "NTASKS": 2, "PROCID": 1, "LOCALID": 0, "STEP_NUM_NODES": 2}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    found = distributed.find()
    assert found is not None and (found.address[0], found.count, found.index, found.detected) == ("node3", 2, 1, True)


def test_lab_ends_with_the_sentence_when_a_host_does_not_come(address):
    words = ["run", "tests/launch/tiny_study.py", "--only", "tiny", "--host-timeout", "2"]
    where = ["--coordinator", address, "--hosts", "2", "--host", "0"]
    command = [sys.executable, "-m", "launch.cli", *words, *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    assert f"1 of 2 hosts did not come to {address} within 2 s: host 1;" in done.stderr


def test_the_meeting_loads_no_jax():
    script = "import launch.distributed, sys; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
