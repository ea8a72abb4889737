# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C ask the loop to save and leave; a second one leaves at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """A run that saved and left because it was asked to, by the signal ``signum``."""

    def __init__(self, name: str, *, step: int, signum: int) -> None:
        super().__init__(f"{name} was interrupted: it is saved at step {step}; the same command goes on from there.")
        self.signum = signum


class Interrupt:
    """Within the block, the first signal only sets ``signum``; outside the main thread signals are left alone."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
