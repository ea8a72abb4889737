# SPDX-License-Identifier: Apache-2.0
"""The journal of a sweep: which tasks were begun for which runs, and what became of them, beside the results.

A task is one thing that an executor runs: a worker process, a request for TPUs, a managed job; it takes one run or a
list of them. Its record is one file, written whole, the next number taken by whoever creates the file first: whatever
moment a submitting process dies at, another one reads the same and goes on. What is known of a run follows from the
records of its tasks and from its results.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launch import store
from launch.locks import is_locked
from research.core.errors import UserError

FOLDER = ".sweep"
LEASE, STALE = "submitter.json", 180.0  # of the process that submits; seconds that its word holds
SWEEP, CANCEL, TASKS, TASK = "sweep.json", "cancel.json", "tasks", "task.json"

State = Literal["intended", "submitted", "active", "ending", "ended"]
# what became of a run within a task
Outcome = Literal[
    "finished",
    "refused",
    "crashed",
    "again",
    "preempted",
    "stalled",
    "hindered",
    "unplaced",
    "declined",
    "untouched",
    "cancelled",
]
# what `lab run` leaves with
AGAIN, CRASHED, REFUSED, STALLED, ALONE, HINDERED = (130, 143), 1, 2, 3, 4, 5
COUNTED: dict[str, tuple[Outcome, ...]] = {
    "failures": ("crashed", "refused"),
    "preemptions": ("again", "preempted"),
    "troubles": ("stalled", "hindered", "unplaced"),
    "declined": ("declined",),
}


@dataclass(frozen=True)
class Ended:
    """How a run left a task. code: its exit status, None where there is none. detail: in words."""

    outcome: Outcome
    code: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Task:
    """A task's record. on: its executor. place: where it is put, as its executor says it (a zone, a worker). version:
    of the code and settings. chips: it
    holds while active. created, active, ended: seconds since 1970; until: when its machines gave their last sign, where
    that is known. history: (time, state, detail) of each change."""

    name: str
    number: int
    on: str
    runs: tuple[str, ...]
    place: str = ""
    version: str = ""
    chips: int = 0
    state: State = "intended"
    detail: str = ""
    created: float = 0.0
    active: float | None = None
    ended: float | None = None
    until: float | None = None
    current: str = ""
    outcomes: dict[str, Ended] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    history: tuple[tuple[float, str, str], ...] = ()

    @property
    def live(self) -> bool:
        """Whether anything of it may still run or hold what it asked for."""
        return self.state != "ended"

    @property
    def chip_hours(self) -> float:
        if self.active is None:
            return 0.0
        return self.chips * max(0.0, (self.ended or time.time()) - self.active) / 3600

    def now(self, state: State, detail: str = "", **changes: Any) -> "Task":
        """The record after a change."""
        moment = time.time()
        stamps = {"active": moment} if state == "active" and self.active is None else {}
        stamps |= {"ended": moment} if state == "ended" and self.ended is None else {}
        history = (
            (*self.history, (moment, state, detail)) if (state, detail) != (self.state, self.detail) else self.history
        )
        return replace(self, state=state, detail=detail, history=history, **{**stamps, **changes})


@dataclass(frozen=True)
class RunState:
    """What the journal says of a run. state: waiting, assigned (in a live task, behind others), running, finished,
    failed, cancelled. until: a waiting one's earliest next start. task: its newest one."""

    name: str
    state: str
    task: Task | None
    counts: dict[str, int]
    detail: str = ""
    until: float = 0.0


@dataclass(frozen=True)
class Patience:
    """When to stop trying a run: after more crashes than ``retries``, more preemptions, troubles (stalls, hosts that do
    not come up, a bucket that does not answer) or requests declined (no quota, no capacity) than these. backoff:
    seconds before the second attempt, doubled for each one after it, to ``longest``."""

    retries: int = 1
    preemptions: int = 100
    troubles: int = 4
    declined: int = 100
    backoff: float = 30.0
    longest: float = 600.0

    def wait(self, attempts: int) -> float:
        return min(self.longest, self.backoff * 2 ** max(0, attempts - 1)) if attempts else 0.0


class Journal:
    """A sweep's journal in its folder of runs. It reads what others wrote each time it is asked."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / FOLDER
        self._ended: dict[str, Task] = {}  # these change no more

    # --- the sweep ---------------------------------------------------------------------------------

    def begin(self, about: dict[str, Any]) -> str:
        """Makes the journal where there is none; the sweep's id, which names what it asks for."""
        made = store.create(self.folder / SWEEP, json.dumps({"id": secrets.token_hex(4), **about}))
        known = self.about()
        if not made:
            store.write(self.folder / SWEEP, json.dumps({**known, **about}))
        return known["id"]

    def about(self) -> dict[str, Any]:
        """Raises UserError where there is no journal."""
        found = store.read_json(self.folder / SWEEP)
        if found is None:
            raise UserError(f"{self.folder.parent} has no journal of a sweep: lab sweep STUDY --on ... begins one.")
        return found

    def cancelled(self) -> set[str]:
        """Runs that are to be ended; "*" is all."""
        return set((store.read_json(self.folder / CANCEL) or {}).get("runs", ()))

    def cancel(self, names: Sequence[str]) -> None:
        store.write(self.folder / CANCEL, json.dumps({"runs": sorted(self.cancelled() | set(names))}))

    def resume(self) -> None:
        """Forgets what was cancelled before: asking for the sweep again is asking for its runs."""
        if self.cancelled():
            store.write(self.folder / CANCEL, json.dumps({"runs": []}))

    def followed(self) -> bool:
        """Whether a process submits this sweep now, as far as this machine can tell."""
        if store.is_remote(self.folder):
            lease = store.read_json(self.folder / LEASE)
            return lease is not None and time.time() - lease["time"] < STALE
        return is_locked(self.folder)

    # --- tasks -------------------------------------------------------------------------------------

    def task_folder(self, task: Task | str) -> Path:
        return self.folder / TASKS / (task if isinstance(task, str) else task.name)

    def tasks(self) -> list[Task]:
        """In the order they were begun."""
        found = []
        for name in store.names(self.folder / TASKS):
            if (task := self._ended.get(name) or self.task(name)) is not None:
                found.append(task)
                if not task.live:
                    self._ended[name] = task
        return sorted(found, key=lambda task: task.number)

    def task(self, name: str) -> Task | None:
        record = store.read_json(self.task_folder(name) / TASK)
        if record is None:
            return None
        outcomes = {run: Ended(**ended) for run, ended in record["outcomes"].items()}
        history = tuple((moment, state, detail) for moment, state, detail in record["history"])
        return Task(**{**record, "runs": tuple(record["runs"]), "outcomes": outcomes, "history": history})

    def intend(self, sweep: str, tasks: Sequence[Task], **task: Any) -> Task | None:
        """Begins the task after ``tasks``, which must be all that there are; None where another process was faster."""
        number = tasks[-1].number + 1 if tasks else 1
        made = Task(name=f"lab-{sweep}-{number}", number=number, created=time.time(), **task)
        made = replace(made, history=((made.created, "intended", ""),))
        return made if store.create(self.task_folder(made) / TASK, _text(made)) else None

    def record(self, task: Task) -> None:
        store.write(self.task_folder(task) / TASK, _text(task))


def _text(task: Task) -> str:
    return json.dumps(asdict(task), indent=1)


def outcome_of(code: int) -> Outcome:
    """What an exit status of ``lab run`` means."""
    if code == 0:
        return "finished"
    if code in AGAIN:
        return "again"
    known: dict[int, Outcome] = {STALLED: "stalled", ALONE: "unplaced", HINDERED: "hindered", REFUSED: "refused"}
    return known.get(code, "crashed")


def states(
    names: Sequence[str],
    tasks: Sequence[Task],
    finished: set[str],
    cancelled: set[str],
    patience: Patience,
    version: str = "",
) -> dict[str, RunState]:
    """What is known of each run. finished: by their results. version: of the code and settings now; what went wrong
    under others does not count."""
    return {name: _state(name, tasks, finished, cancelled, patience, version) for name in names}


def _state(
    name: str, tasks: Sequence[Task], finished: set[str], cancelled: set[str], patience: Patience, version: str
) -> RunState:
    mine = [task for task in tasks if name in task.runs]
    ends = [task.outcomes[name] for task in mine if name in task.outcomes and task.version == version]
    counts = {what: sum(end.outcome in kinds for end in ends) for what, kinds in COUNTED.items()}
    last = mine[-1] if mine else None

    def state(what: str, detail: str = "", until: float = 0.0) -> RunState:
        return RunState(name, what, last, counts, detail, until)

    if name in finished:
        return state("finished")
    if last is not None and last.live:
        # even one that has left may be begun again by a machine that boots, until nothing of the task is left
        left = last.outcomes.get(name)
        detail = last.detail if left is None else f"{left.outcome}; the others of {last.name} go on"
        return state("running" if last.current == name else "assigned", detail)
    end = ends[-1] if ends else None
    if end is not None and (end.outcome == "refused" or counts["failures"] > patience.retries):
        return state("failed", end.detail)
    for what in ("preemptions", "troubles", "declined"):
        if counts[what] > getattr(patience, what):
            times = "times declined" if what == "declined" else what
            return state("failed", f"{counts[what]} {times}, the last: {end.detail if end else ''}")
    if cancelled & {name, "*"}:
        return state("cancelled")
    attempts = sum(end.outcome not in ("untouched", "cancelled") for end in ends)
    until = (last.ended or last.created) + patience.wait(attempts) if last is not None and attempts else 0.0
    return state("waiting", end.detail if end else "", until)
