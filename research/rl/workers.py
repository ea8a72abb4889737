# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that can be ended, for verifiers from libraries.

Such a verifier may raise outside the main thread (``signal.alarm``), may evaluate text, and may run for minutes on
``(10^6)!``. Here it runs in a process of its own with a deadline and a memory limit, and whatever a text does to it
comes back as a ``Result``. Processes start when they are first needed, and end with the pool or with the process that
made it.
"""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any, Literal, NamedTuple

from research.core.errors import UserError
from research.rl.worker_main import LIMIT

Failure = Literal["", "time", "memory", "error", "crash", "size"]
START = 120.0  # seconds on the clock that a process has to start, and to import what a call needs
PATIENCE = 10  # a call's deadline in CPU time, times this, is its deadline on the clock
ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
FIXED = {
    "PYTHONHASHSEED": "0",  # libraries go through sets: one order in all processes
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}


class Result(NamedTuple):
    """A call's JSON value, or how it failed, "" where it did not: out of "time" or "memory", an "error" was raised, the
    process ended ("crash"), or the arguments were too long to send ("size"). detail: an error's own words."""

    value: Any = None
    failure: Failure = ""
    detail: str = ""


class Workers:
    """Up to ``count`` processes (0: as many as there are cores). Any number of threads may call at once.

    seconds: CPU time that a call may take, so that verdicts do not depend on how busy the machine is; what does not
    come back to Python is ended at twice that, and what waits without computing at ten times that on the clock.
    memory: bytes of address space of each process, its libraries' own among them (about 0.2 GB).
    """

    def __init__(self, count: int = 0, seconds: float = 5.0, memory: int = 2 << 30) -> None:
        if count < 0 or not 0 < seconds < 3600 or memory < 1 << 28:
            raise UserError(
                "Workers need a count of at least 0, seconds above 0 and below an hour, and memory of at least 2**28 "
                f"bytes; given {count}, {seconds} and {memory}."
            )
        self.seconds, self.memory = seconds, memory
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()  # the last used is warm
        for _ in range(count or os.cpu_count() or 1):
            self._free.put(None)
        self._running: set[_Process] = set()
        self._end = weakref.finalize(self, _end_all, self._running, os.getpid())

    def call(self, name: str, *arguments: Any, seconds: float | None = None) -> Result:
        """What ``module:function`` makes of JSON arguments, in the first process that is free. Raises UserError where
        it cannot be loaded, and nothing for what the arguments cause. seconds: another deadline."""
        limit = self.seconds if seconds is None else seconds
        request = json.dumps({"call": name, "arguments": arguments, "seconds": limit}).encode() + b"\n"
        if len(request) > LIMIT:
            return Result(failure="size")
        process = self._free.get()
        try:
            while True:
                if process is None:
                    self._running.add(process := _Process(self.memory))
                fresh, process.used = not process.used, True
                result = process.call(request, limit * PATIENCE)
                if not process.begun and (fresh or result.failure in ("error", "time")):
                    raise UserError(f"The verifier {name} could not be loaded ({result.detail or result.failure}).")
                if process.ended or result.failure in ("memory", "crash"):
                    self._drop(process)
                    process = None
                # what earlier calls left behind must not decide
                if fresh or result.failure not in ("memory", "crash"):
                    return result
        except BaseException:  # Ctrl-C: the reply is still to come, and must not be the next call's
            if process is not None:
                self._drop(process)
                process = None
            raise
        finally:
            self._free.put(process)

    def _drop(self, process: "_Process") -> None:
        process.close()
        self._running.discard(process)

    def close(self) -> None:
        """Ends all processes; a call that comes after starts new ones."""
        _end_all(self._running, os.getpid())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Process:
    """One process and the pipes to it. used: whether it has had a call. begun: whether the last one got as far as the
    function. ended: whether it is no more."""

    def __init__(self, memory: int) -> None:
        self.used = self.begun = self.ended = False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "research.rl.worker_main", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=kept | FIXED | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        assert self._child.stdin and self._child.stdout and self._child.stderr
        self._in, self._out = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._in, False)
        self._rest = b""
        if self._receive(START) is None:
            self._child.kill()
            said = self._child.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise UserError(f"A verifier's process did not start ({said[-1] if said else 'it said nothing'}).")
        self._child.stderr.close()

    def call(self, request: bytes, seconds: float) -> Result:
        """Sends a request and waits for its reply; where none comes, the process is ended."""
        self.begun, reply = False, None
        if self._send(request, START):
            reply = self._receive(START)
            self.begun = reply == {"begun": True}
            if self.begun:
                reply = self._receive(seconds)
        if reply is not None:
            return Result(**reply)
        late = self._child.poll() is None and not self._hung_up
        code = self.end()
        return Result(failure="time" if late or code == -signal.SIGXCPU else "crash")

    def _send(self, data: bytes, seconds: float) -> bool:
        self._hung_up, until = False, time.monotonic() + seconds
        try:
            while data:
                if not _ready(self._in, select.POLLOUT, until):
                    return False
                data = data[os.write(self._in, data) :]
        except OSError:
            self._hung_up = True
            return False
        return True

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None where none comes in time, or the process has ended."""
        self._hung_up, until = False, time.monotonic() + seconds
        while b"\n" not in self._rest:
            try:
                if not _ready(self._out, select.POLLIN, until):
                    return None
                more = os.read(self._out, 1 << 16)
            except OSError:
                more = b""
            if not more:
                self._hung_up = True
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def end(self) -> int:
        """Its exit code, once it is over."""
        self.ended = True
        if self._hung_up:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._child.wait(timeout=5)  # it ended by itself: of what?
        self._child.kill()
        return self._child.wait()

    def close(self) -> None:
        """Ends it and closes its pipes, at which nobody may be waiting."""
        self.end()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                pipe.close()


def _ready(number: int, events: int, until: float) -> bool:
    poll = select.poll()
    poll.register(number, events)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


def _end_all(running: "set[_Process]", owner: int) -> None:
    """Not in a process that was forked off the owner, to which they do not belong."""
    if os.getpid() == owner:
        for process in list(running):
            running.discard(process)
            process.end()


@functools.cache
def installed(module: str, package: str) -> None:
    """Raises UserError where a verifier's library is not there; it is not imported."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{package} is not installed: pip install -c constraints.txt -e '.[rl]'.")


def shared(count: int = 0, seconds: float = 5.0, memory: int = 2 << 30) -> Workers:
    """The pool of these settings, one in each process."""
    return _shared(os.getpid(), count, seconds, memory)


@functools.cache
def _shared(owner: int, count: int, seconds: float, memory: int) -> Workers:
    return Workers(count, seconds, memory)
