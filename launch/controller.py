# SPDX-License-Identifier: Apache-2.0
"""Takes a sweep to its end on any executor: begins tasks, follows them, and begins again what was taken away.

All that it knows is in the journal and the results, so that it may be killed at any moment and started again. A run is
put into a new task only when no live task has it, and a task is over only when its executor says that nothing of it is
left: no run is done twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launch.executor import Executor, Refused, Report, Stop, Unreachable
from launch.journal import Ended, Journal, Outcome, Patience, RunState, Task, outcome_of, states

UNREACHED = 20  # times in a row that an executor may not be reached where the user has to mend something


@dataclass(frozen=True)
class Wanted:
    """A run of the sweep. flops: what it costs, to share runs out. finished: whether its result is there. after: the
    runs that it begins from."""

    name: str
    flops: float
    finished: Callable[[], bool]
    after: tuple[str, ...] = ()


@dataclass
class Controller:
    """budget: chip-hours after which nothing more is submitted. say: takes lines for whoever watches. explain: what a
    failed run left to say. version: of the code and settings: under others, runs that failed are tried again."""

    journal: Journal
    sweep: str
    executor: Executor
    runs: Sequence[Wanted]
    parallel: int
    patience: Patience
    say: Callable[[str], None]
    budget: float | None = None
    explain: Callable[[str], str] = lambda run: ""
    version: str = ""
    _done: set[str] = field(default_factory=set)
    _looked: bool = False
    _unreached: int = 0
    _told: str = ""

    def finished(self) -> set[str]:
        """Runs whose results are there: read once, and then as tasks end."""
        if not self._looked:
            self._done |= {run.name for run in self.runs if run.finished()}
            self._looked = True
        return self._done

    def states(self, tasks: Sequence[Task] | None = None) -> dict[str, RunState]:
        """What is known of each run; tasks: the journal's, where they have just been read."""
        tasks = self.journal.tasks() if tasks is None else tasks
        names = [run.name for run in self.runs]
        return states(names, tasks, self.finished(), self.journal.cancelled(), self.patience, self.version)

    def step(self) -> bool:
        """One round: what became of the live tasks, then new ones. False when there is nothing left to wait for."""
        unreached = None
        for task in self.journal.tasks():
            if task.live:
                try:
                    self._follow(task)
                except Unreachable as error:
                    unreached = error
        self._unreached = self._unreached + 1 if unreached is not None else 0
        if unreached is not None:
            self._tell(f"{self.executor.name} could not be reached ({unreached}); trying again")
            if unreached.mend and self._unreached >= UNREACHED:
                raise Stop(f"{unreached}: {unreached.mend}, then repeat the command; what runs goes on meanwhile.")
        if unreached is None or not unreached.mend:  # one task's trouble keeps no other from beginning
            self._begin()
        tasks = self.journal.tasks()
        if any(task.live for task in tasks):
            return True
        return any(run.state == "waiting" for run in self._unhindered(tasks).values()) and not self._spent(tasks)

    def _unhindered(self, tasks: Sequence[Task]) -> dict[str, RunState]:
        """Of the runs whose inputs may still come: not of those that begin from one that failed or was cancelled."""
        known, hindered = self.states(tasks), set[str]()
        for run in self.runs:  # inputs stand before what begins from them
            if any(known[name].state in ("failed", "cancelled") or name in hindered for name in run.after):
                hindered.add(run.name)
        return {name: state for name, state in known.items() if name not in hindered}

    # --- tasks that there are ----------------------------------------------------------------------

    def _follow(self, task: Task) -> None:
        if task.on != self.executor.name:
            raise Stop(
                f"{task.name} was begun with --on {task.on} and is not over: go on with that, or lab cancel it first."
            )
        cancelled = self.journal.cancelled()
        left = {run for run in task.runs if run not in task.outcomes}
        if task.state != "ending" and cancelled and ("*" in cancelled or cancelled >= left):
            task = self._end(task, Report("ended", "cancelled"), "cancelled")
        if task.state == "intended":
            try:
                extra = self.executor.submit(task)
                task = self._record(task.now("submitted", "", extra={**task.extra, **extra}))
            except Refused as error:
                task = self._end(task, Report("failed" if error.lasting else "declined", str(error)))
        if task.state != "ending":
            task = self._poll(task)
        if task.state == "ending" and self.executor.cancel(task):
            self._record(task.now("ended", task.detail, ended=task.until or time.time()))

    def _poll(self, task: Task) -> Task:
        report = self.executor.poll(task)
        if report.began is not None and (task.active is None or report.began < task.active):
            task = replace(task, active=report.began)  # nobody may have looked when it began
        if report.condition in ("pending", "active"):
            state = "submitted" if report.condition == "pending" else "active"
            known = {run: self._ended(run, report) for run in report.codes}
            after = task.now(state, report.detail, current=report.current, outcomes={**known, **task.outcomes})
            self._say_ends(task, after)
            return self._record(after) if after != task else task
        if report.condition == "absent" and task.state == "submitted" and task.active is None:
            return self._end(task, replace(report, condition="failed", detail=report.detail or "it is not there"))
        return self._end(task, report)

    def _end(self, task: Task, report: Report, why: Outcome | None = None) -> Task:
        """Says what became of each of its runs. One that has no exit status was in hand, or had not begun."""
        outcomes = dict(task.outcomes)
        for run in task.runs:
            if run not in outcomes and run in report.codes:
                outcomes[run] = self._ended(run, report)
        left = [run for run in task.runs if run not in outcomes]
        in_hand = report.current or task.current or (left[0] if left else "")
        for run in left:
            if run == in_hand and self._has_result(run):  # taken away before it could say so
                ended = Ended("finished", None, report.detail)
            elif why is not None:
                ended = Ended(why, None, report.detail)
            elif report.condition in ("failed", "declined"):
                ended = Ended("unplaced" if report.condition == "failed" else "declined", None, report.detail)
            elif run != in_hand:
                ended = Ended("untouched", None, report.detail)
            elif report.condition in ("lost", "absent"):
                ended = Ended("preempted", None, report.detail)
            else:
                ended = Ended("crashed", None, report.details.get(run) or report.detail or "it left no exit status")
            outcomes[run] = ended
        after = task.now("ending", report.detail, current="", outcomes=outcomes, until=report.until)
        self._say_ends(task, after)
        return self._record(after)

    def _ended(self, run: str, report: Report) -> Ended:
        """How a run left that has an exit status."""
        code = report.codes[run]
        outcome = outcome_of(code)
        detail = report.details.get(run, "")
        if outcome == "finished" and not self._has_result(run) and any(one.name == run for one in self.runs):
            outcome, detail = "crashed", "it left no result"
        if outcome not in ("finished", "again") and not detail:
            detail = self.explain(run) or f"exit status {code}"
        return Ended(outcome, code, detail)

    def _has_result(self, run: str) -> bool:
        here = next((one for one in self.runs if one.name == run), None)  # None: no longer in the study
        if run not in self._done and here is not None and here.finished():
            self._done.add(run)
        return run in self._done

    def _record(self, task: Task) -> Task:
        self.journal.record(task)
        return task

    # --- new tasks ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        while True:
            tasks = self.journal.tasks()
            if self._spent(tasks) or (chosen := self._next(tasks)) is None:
                return
            task = self.journal.intend(self.sweep, tasks, **chosen)
            if task is None:  # another process took that number: look again
                continue
            self.say(f"{task.name} at {task.place}: {', '.join(task.runs)}")
            try:
                self._follow(task)
            except Unreachable as error:
                self._tell(f"{self.executor.name} could not be reached ({error}); trying again")
                return

    def _next(self, tasks: Sequence[Task]) -> dict[str, Any] | None:
        """What the next task is to be, after these; None where it is not its time."""
        live, now = sum(task.live for task in tasks), time.time()
        known = self.states(tasks)
        ready = [
            run
            for run in self.runs
            if known[run.name].state == "waiting" and known[run.name].until <= now and self.finished() >= set(run.after)
        ]
        if not ready or live >= self.parallel:
            return None
        chosen = ready[:1]
        if self.executor.packs:
            suspect = {name for name, run in known.items() if run.counts["failures"] + run.counts["troubles"]}
            chosen = share(ready, suspect, self.parallel - live)
        runs = tuple(run.name for run in chosen)
        if (place := self.executor.places(tasks, known[runs[0]].task)) is None:
            return None
        where = {"on": self.executor.name, "place": place, "chips": self.executor.chips}
        return {**where, "runs": runs, "version": self.version}

    def preview(self) -> list[Task]:
        """The tasks that the first round would begin."""
        tasks = self.journal.tasks()
        known = len(tasks)
        while (chosen := self._next(tasks)) is not None:
            number = len(tasks) + 1
            tasks.append(Task(name=f"lab-{self.sweep}-{number}", number=number, **chosen))
        return tasks[known:]

    def _spent(self, tasks: Sequence[Task]) -> bool:
        if self.budget is None:
            return False
        used = sum(task.chip_hours for task in tasks)
        if used >= self.budget:
            self._tell(f"the budget of {self.budget:g} chip-hours is used ({used:.3g}): nothing more is submitted")
        return used >= self.budget

    # --- words -------------------------------------------------------------------------------------

    def _say_ends(self, before: Task, after: Task) -> None:
        for run, ended in after.outcomes.items():
            if run not in before.outcomes and ended.outcome not in ("untouched", "cancelled"):
                self.say(f"{run}: {ended.outcome}" + (f" ({ended.detail})" if ended.detail else ""))

    def _tell(self, text: str) -> None:
        """Says it once, however often it holds."""
        if text != self._told:
            self._told = text
            self.say(text)


def share(ready: Sequence[Wanted], suspect: set[str], rooms: int) -> list[Wanted]:
    """The next task's part of what is ready, about equal in FLOPs, so that each room gets one; what has crashed or
    stalled goes alone."""
    if ready[0].name in suspect:
        return [ready[0]]
    fresh = [run for run in ready if run.name not in suspect]
    part, chosen = sum(run.flops for run in fresh) / rooms, list[Wanted]()
    for position, run in enumerate(fresh):
        others = len(fresh) - position
        if chosen and (sum(one.flops for one in chosen) + run.flops / 2 > part or others < rooms):
            break
        chosen.append(run)
    return chosen


def summary(known: Mapping[str, RunState]) -> str:
    """How many runs are in each state."""
    order = ("finished", "running", "assigned", "waiting", "failed", "cancelled")
    counts = {state: sum(run.state == state for run in known.values()) for state in order}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
