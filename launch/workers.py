# SPDX-License-Identifier: Apache-2.0
"""``--on local``: worker processes on this machine, each with its share of the cores and accelerators.

A worker is a session of its own and outlives the process that started it. It holds a lock that it got from that process
before it began, so that whoever asks knows whether it lives, and leaves its exit status in a file.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import host, store
from launch.executor import Report, Unreachable
from launch.journal import AGAIN, Journal, Task

EXIT, HELD, LOG, PID = "exit", "held", "log.txt", "pid"
BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}  # of so many chips of a TPU host, as libtpu wants them
GRACE = 60.0  # seconds between asking a worker to save and leave, and ending it
# so that the status is there whole, or not at all
WORKER = '"$@" & child=$!; echo $child > "$LAB_PID"; wait $child; code=$?; ' \
         'echo $code > "$LAB_EXIT.part"; mv "$LAB_EXIT.part" "$LAB_EXIT"'  # fmt: skip


@dataclass
class Workers:
    """words: of ``lab`` before ``run STUDY --only NAME``'s own. count: of workers at a time."""

    journal: Journal
    command: Sequence[str]
    count: int
    name: str = "local"
    packs: bool = False
    chips: int = 0
    _asked: dict[str, float] = field(default_factory=dict)

    def places(self, tasks: Sequence[Task], last: Task | None) -> str | None:
        taken = {task.place for task in tasks if task.live}
        mine = (f"worker {i} of {socket.gethostname()}" for i in range(self.count))
        return next((place for place in mine if place not in taken), None)

    def _check(self, task: Task) -> None:
        """Raises Unreachable for a worker of another machine, which alone can say whether it lives."""
        if (host := task.place.rpartition(" of ")[2]) != socket.gethostname():
            raise Unreachable(
                f"{task.name} is a worker of {host}", mend=f"go on there, or lab cancel {task.runs[0]} there"
            )

    def submit(self, task: Task) -> dict:
        self._check(task)
        folder = self._folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        (run,) = task.runs
        with self._lock(folder) as lock:
            if lock is None or (folder / EXIT).exists():
                return {}
            index = int(task.place.split()[1])
            with (folder / LOG).open("ab") as log, pinning(index, self.count):
                subprocess.Popen(
                    ["/bin/sh", "-c", WORKER, "sh", *self.command, "--only", run],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True,
                    env=os.environ | pinned(index, self.count) | {
                        "LAB_EXIT": str(folder.absolute() / EXIT), "LAB_PID": str(folder.absolute() / PID),
                    },
                )  # fmt: skip
        return {}

    def poll(self, task: Task) -> Report:
        self._check(task)
        folder, (run,) = self._folder(task), task.runs
        with self._lock(folder) as lock:
            if lock is None:
                return Report("active", current=run)
        try:
            code = int((folder / EXIT).read_text())
        except (OSError, ValueError):
            return Report("ended", "the worker left no exit status: it was killed", current=run)
        failed = code not in (0, *AGAIN)
        return Report("ended", codes={run: code}, details={run: last_words(folder / LOG)} if failed else {})

    def cancel(self, task: Task) -> bool:
        self._check(task)
        folder = self._folder(task)
        with self._lock(folder) as lock:
            if lock is not None:
                return True
        if task.name not in self._asked:  # once to save and leave; after a while, for good
            self._asked[task.name] = time.monotonic()
            self._signal(folder, signal.SIGTERM)
        elif time.monotonic() - self._asked[task.name] > GRACE:
            self._signal(folder, signal.SIGKILL)
        return False

    def logs(self, task: Task, run: str) -> list[Path]:
        return [self._folder(task) / LOG]

    def preview(self, task: Task) -> str:
        return f"$ {shlex.join([*self.command, '--only', *task.runs])}"

    def interrupt(self, tasks: Sequence[Task]) -> str:
        for task in tasks:
            self._signal(self._folder(task), signal.SIGTERM)
        return "the workers save and leave; the same command goes on from there"

    def _folder(self, task: Task) -> Path:
        """Of locks and output, which are this machine's."""
        folder = self.journal.task_folder(task)
        return host.mirrored(folder) if store.is_remote(folder) else folder

    def _signal(self, folder: Path, number: int) -> None:
        """To the run, not to the shell that waits for its status."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / PID).read_text()), number)

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[int | None]:
        """A descriptor that holds the task's lock, or None where a worker holds it."""
        try:
            handle = os.open(folder / HELD, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Unreachable(f"{folder} cannot be used ({error.strerror})") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield handle
        finally:
            os.close(handle)


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(index: int, count: int) -> None:
    """Keeps this process to its share of the cores, where the machine can and there is one for each worker."""
    mine = cores()[index::count]
    if mine and len(cores()) >= count > 1:
        os.sched_setaffinity(0, mine)


@contextlib.contextmanager
def pinning(index: int, count: int) -> Iterator[None]:
    """What is started within inherits a worker's cores: running code in a child that was forked may lock up where JAX
    has threads."""
    before = cores()
    pin(index, count)
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)


def tpu_chips() -> list[Path]:
    """Of this host."""
    return sorted(Path("/dev").glob("accel[0-9]*")) or sorted(Path("/dev/vfio").glob("[0-9]*"))


def pinned(index: int, count: int) -> dict[str, str]:
    """Settings that keep a worker to its share of the accelerators: NVIDIA's, or the TPU chips of this host."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else [
        str(number) for number, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))
    ]  # fmt: skip
    if count > 1 and gpus:
        mine = gpus[index::count] if len(gpus) >= count else [gpus[index % len(gpus)]]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
    chips = tpu_chips()
    each = max((n for n in BOUNDS if n * count <= len(chips)), default=0)
    if count > 1 and each:
        mine = ",".join(str(chip) for chip in range(index * each, (index + 1) * each))
        bounds = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": BOUNDS[each]}
        return {"TPU_VISIBLE_CHIPS": mine, **bounds, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return {}


NOISE = ("JAX has removed its internal frames", "JAX_TRACEBACK_FILTERING", "The above exception was the direct cause")


def last_words(log: Path, lines: int = 3) -> str:
    """The end of a run's output."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    kept = [line.strip() for line in text.splitlines() if line.strip(" ^~-\t") and not any(w in line for w in NOISE)]
    error = [line for line in kept if line.startswith("lab: error:")]
    return error[-1].removeprefix("lab: error: ") if error else " | ".join(kept[-lines:])


def lab(*words: str) -> list[str]:
    """The command, by this interpreter."""
    return [sys.executable, "-m", "launch.cli", *words]
