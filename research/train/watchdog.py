# SPDX-License-Identifier: Apache-2.0
"""Ends a run that makes no progress. A host that dies, a file system that hangs or a stream that blocks would leave
the process, and all that compute with it, waiting for ever in a call that no Python exception reaches."""

import os
import sys
import threading
from typing import Any

EXIT_CODE = 3
MINUTES = 30.0  # by default
PATIENCE = 4  # times longer for what is long by nature: the first step, which compiles, evaluations, checkpoints
TICKS = 60  # how often it looks, within its limit


class Watchdog:
    """Within its ``with``, ends the process where nothing is expected anew for ``minutes`` (0: never)."""

    def __init__(self, name: str, minutes: float) -> None:
        self.name, self.minutes = name, minutes
        self._what, self._limit, self._ticks = "the start", TICKS * PATIENCE, 0
        self._over = threading.Event()

    def expect(self, what: str, *, patient: bool = False) -> None:
        """Says what the run now waits for, and begins to count. patient: it may take ``PATIENCE`` times as long."""
        self._ticks, self._limit, self._what = 0, TICKS * (PATIENCE if patient else 1), what

    def _watch(self) -> None:
        # Ticks are counted, not the clock read: a process that was stopped for an hour has not hung for one.
        while not self._over.wait(self.minutes * 60 / TICKS):
            self._ticks += 1
            if self._ticks >= self._limit:
                self._end()

    def _end(self) -> None:
        threading.Timer(10, os._exit, (EXIT_CODE,)).start()  # where even printing hangs
        minutes = self.minutes * self._limit / TICKS
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        print(
            f"{cursor}\nlab: error: {self.name} made no progress for {minutes:.3g} minutes and was ended: it waited "
            f"for {self._what}. See whether another host, the data or a disk hangs; the same command goes on from the "
            "last checkpoint (--stall-minutes for another limit).",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # the main thread may never come back from where it waits

    def __enter__(self) -> "Watchdog":
        if self.minutes > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._over.set()
