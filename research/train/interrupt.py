# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C ask the loop to save and leave; a second Ctrl-C leaves at once. A signal to one of several hosts
is one to all."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from research.core.types import Array
from research.train import hosts


class Interrupt:
    """Within the block, the first signal only sets ``signum``; outside the main thread signals are left alone."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}
        self._said: Array | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
        elif signum == signal.SIGINT:  # a person's; a machine that is shut down may well ask twice, and must not hurry
            raise KeyboardInterrupt

    def asked(self) -> int | None:
        """The signal to leave for, if any; asked once a step. With several hosts all get the same answer: what
        they said a step ago, which has come by now, so that nobody waits for it."""
        if not hosts.several():
            return self.signum
        before, self._said = self._said, hosts.largest(self.signum or 0)
        return (int(before) or None) if before is not None else None

    def asked_last(self) -> int | None:
        """As ``asked``, once the run is done: what all hosts say now."""
        return int(hosts.largest(self.signum or 0)) or None if hosts.several() else self.signum

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
