# SPDX-License-Identifier: Apache-2.0
"""What a place to run must be able to do; ``launch.controller`` does the rest for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from launch.journal import Task
from research.core.errors import UserError

Condition = Literal["absent", "pending", "active", "ended", "lost", "failed", "declined"]


class Unreachable(Exception):
    """The executor could not be asked just now (a time-out, the network, a login that ran out): nothing is known, and
    it is asked again. mend: what the user would have to do, where it does not pass by itself."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.mend = mend


class Refused(Exception):
    """Asked for in vain: no quota or capacity. lasting: what is asked for is wrong, and waiting will not help."""

    def __init__(self, what: str, *, lasting: bool = False) -> None:
        super().__init__(what)
        self.lasting = lasting


class Stop(UserError):
    """Nothing can be submitted until the user has mended something."""


@dataclass(frozen=True)
class Report:
    """How a task stands. absent: it is nowhere; pending: asked for; active: it runs; ended: it has done what it could;
    lost: taken away (preempted); failed: it never came to run; declined: it was not given what it asked for. codes:
    exit statuses of its runs so far. current: the run in hand. details: more on a run's end, in words. began,
    until: since when, and until when, it held its machines, where that is known."""

    condition: Condition
    detail: str = ""
    codes: Mapping[str, int] = field(default_factory=dict)
    current: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    began: float | None = None
    until: float | None = None


class Executor(Protocol):
    """name: as ``--on`` has it. packs: whether a task takes several runs, one after the other. chips: of one task."""

    name: str
    packs: bool

    @property
    def chips(self) -> int: ...

    def places(self, tasks: Sequence[Task], last: Task | None) -> str | None:
        """Where the next task is to go; None where there is no room besides the live ones of ``tasks``. last: the task
        that its first run was in before."""
        ...

    def submit(self, task: Task) -> dict:
        """Asks for it, or finds that it was asked for before: calling this twice is calling it once. What it gives is
        kept in the task's record. Raises Refused."""
        ...

    def poll(self, task: Task) -> Report: ...

    def cancel(self, task: Task) -> bool:
        """Ends it and gives back what it holds; True once nothing is left. Called until it is."""
        ...

    def logs(self, task: Task, run: str) -> list[Path]:
        """Files that a run's output goes to, one for each host."""
        ...

    def preview(self, task: Task) -> str:
        """Every command and file that submitting would send."""
        ...

    def interrupt(self, tasks: Sequence[Task]) -> str:
        """The submitting process was asked to stop: says what becomes of the tasks."""
        ...
