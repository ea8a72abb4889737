# SPDX-License-Identifier: Apache-2.0
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from research.core.types import UserError
from research.rl.worker_main import LIMIT
from research.rl.workers import Result, Workers, installed, shared
from tests.conftest import ROOT

CALLS = "tests.rl.worker_calls:"


@pytest.fixture(scope="module")
def pool():
    pool = Workers(2, seconds=0.3, memory=1 << 29)
    yield pool
    pool.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid):
    until = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_call_gives_the_result_and_knows_nothing_of_jax(pool):
    assert pool.call(CALLS + "add", 1, 2) == Result(3)
    assert pool.call(CALLS + "add", "\ud800\0é", "٣") == Result("\ud800\0é٣")
    assert pool.call(CALLS + "environment") == Result([])


@pytest.mark.parametrize(
    "name, failure",
    [
        ("loop", "time"),
        ("swallow", "time"),
        ("swallow_once", "time"),
        ("never_back_to_python", "time"),
        ("hoard", "memory"),
        ("crash", "crash"),
        ("long_result", "error"),
        ("no_json", "error"),
        ("bad_words", "error"),
        ("leave", "error"),
    ],
)
def test_what_goes_wrong_is_told_and_the_pool_goes_on(pool, name, failure):
    assert pool.call(CALLS + name).failure == failure
    assert pool.call(CALLS + "add", 1, 2) == Result(3)


def test_what_waits_without_computing_is_ended_too(pool):
    assert pool.call(CALLS + "slow_pid", 1000, seconds=0.05).failure == "time"
    assert pool.call(CALLS + "add", 1, 2) == Result(3)


def test_errors_have_their_own_words(pool):
    assert pool.call(CALLS + "add", 1).detail.startswith("TypeError: add() missing")
    assert pool.call(CALLS + "leave").detail == "SystemExit: gone"


def test_what_is_too_long_is_not_sent(pool):
    assert pool.call(CALLS + "add", "x" * LIMIT, "").failure == "size"
    assert pool.call(CALLS + "add", "x" * (LIMIT // 3), "y").value.endswith("xy")


def test_alarms_work_and_do_not_outlive_the_call(pool):
    with Workers(1) as alone:
        assert alone.call(CALLS + "alarm") == Result("rung")
        pid = alone.call(CALLS + "pid").value
        assert not alone.call(CALLS + "leave_an_alarm").failure
        assert alone.call(CALLS + "slow_pid", 0.4) == Result(pid)


def test_what_a_library_prints_goes_nowhere(pool):
    for _ in range(3):
        assert pool.call(CALLS + "chatter") == Result(["silence"])


def test_a_process_that_earlier_calls_spoiled_does_not_decide():
    for name in ("crash_the_second_time", "hoard_the_second_time"):
        with Workers(1, memory=1 << 29) as alone:
            first = alone.call(CALLS + name)
            assert not first.failure and alone.call(CALLS + name) == first


def test_a_process_that_died_between_two_calls_is_replaced():
    with Workers(1) as alone:
        pid = alone.call(CALLS + "pid").value
        os.kill(pid, 9)
        assert gone(pid)
        assert alone.call(CALLS + "add", 1, 2) == Result(3)


def test_threads_share_the_processes(pool):
    def one(i):
        if i % 10 == 9:
            assert pool.call(CALLS + "loop", seconds=0.05).failure == "time"
        return pool.call(CALLS + "add", i, 1).value, pool.call(CALLS + "slow_pid", 0.002).value

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(one, range(64)))
    assert [value for value, _ in found] == list(range(1, 65))
    assert len({pid for _, pid in found}) <= 2


@pytest.mark.parametrize("name", ["write", "write_low", "run", "shell"])
def test_a_call_makes_no_files_and_starts_no_programs(pool, name, tmp_path):
    assert "PermissionError" in pool.call(CALLS + name, str(tmp_path / "x")).detail
    assert not list(tmp_path.iterdir())


def test_a_call_removes_nothing_and_may_read(pool, tmp_path):
    (tmp_path / "x").write_text("here")
    assert pool.call(CALLS + "remove", str(tmp_path / "x")).failure == "error"
    assert pool.call(CALLS + "read", str(tmp_path / "x")) == Result("here")


def test_processes_end_with_their_pool():
    pool = Workers(1)
    pid = pool.call(CALLS + "pid").value
    assert is_alive(pid)
    del pool
    gc.collect()
    assert gone(pid)


@pytest.mark.parametrize("end", ["raise SystemExit", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_processes_end_with_their_parent_even_in_a_call(end):
    script = (
        "import os, threading, time; from research.rl.workers import shared\n"
        f"pool = shared(2, 600.0)\nprint(pool.call('{CALLS}pid').value)\n"
        f"threading.Thread(target=pool.call, args=('{CALLS}slow_pid', 500), daemon=True).start()\n"
        f"print(pool.call('{CALLS}slow_pid', 0.1).value, flush=True)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_one_pool_for_the_same_settings():
    assert shared(1, 2.0) is shared(1, 2.0) and shared(1, 2.0) is not shared(1, 3.0)


def test_mistakes_are_one_sentence(monkeypatch):
    for settings in [dict(count=-1), dict(seconds=0), dict(memory=1000)]:
        with pytest.raises(UserError, match="Workers need"):
            Workers(**settings)
    with Workers(1, memory=1 << 28) as pool:
        for name in ("no.such.module:f", CALLS + "absent", "tests.rl.worker_crash:f"):
            for _ in range(2):
                with pytest.raises(UserError, match=f"verifier {name} could not be loaded"):
                    pool.call(name)
        assert pool.call(CALLS + "add", 1, 2) == Result(3)
    with pytest.raises(UserError, match="pip install"):
        installed("no_such_module", "no-such-package")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="did not start"):
        Workers(1).call(CALLS + "add", 1, 2)
