# SPDX-License-Identifier: Apache-2.0
"""What a person watching a run sees: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    def start(self, name: str, *, total: int, step: int) -> None: ...

    def update(self, step: int, values: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, name: str, *, total: int, step: int) -> None: ...

    def update(self, step: int, values: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def describe(values: Mapping[str, Any]) -> str:
    parts = [f"{name} {float(values[name]):.4f}" for name in ("reward", "loss") if name in values]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if values.get("peak_share") is not None:
        parts.append(f"{values['peak_share']:.0%} of peak")
    return ", ".join(parts)


class Lines:
    """A plain line for the first step, every few seconds, and the last step: for logs and pipes."""

    def __init__(self) -> None:
        self._name, self._total, self._last = "", 0, 0.0
        self._begun: tuple[int, float] | None = None

    def start(self, name: str, *, total: int, step: int) -> None:
        self._name, self._total, self._last, self._begun = name, total, 0.0, None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if step == self._total or now - self._last > SECONDS_BETWEEN_LINES:
            self._last = now
            left = ""
            if self._begun is not None:  # the first step's time is mostly compilation: it foretells nothing
                done, seconds = step - self._begun[0], now - self._begun[1]
                left = f", {seconds / max(1, done) * (self._total - step):.0f} s left"
            self.note(f"{self._name}: step {step}/{self._total}, {describe(values)}{left}")
        if self._begun is None:
            self._begun = (step, now)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def stop(self) -> None: ...


class Bar:
    """A progress bar with loss, tokens/s, share of peak FLOP/s and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def start(self, name: str, *, total: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        columns = (
            TextColumn(  # a name may hold brackets, and more letters than a terminal has room for
                "{task.description}", style="bold", markup=False, table_column=Column(max_width=16, no_wrap=True)
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the rest leaves
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[info]}", markup=False),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), expand=True, refresh_per_second=4)
        self._task = self._bar.add_task(name, total=total, completed=step, info="compiling")
        self._bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=step, info=describe(values))

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def choose() -> Progress:
    return Bar() if sys.stderr.isatty() else Lines()
