# SPDX-License-Identifier: Apache-2.0
"""Watches a run: reads each step's metrics once the next step is under way, times it, writes, shows, and stops
a run whose numbers are no longer numbers. Of several hosts all read and stop alike; the first writes and shows."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from research.core.types import Metrics, UserError
from research.train import hosts
from research.train.checkpoint import Checkpointer
from research.train.experiment import Experiment
from research.train.metrics import MetricsWriter, Unwritten
from research.train.progress import Progress, Silent
from research.train.watchdog import Watchdog

WORDS = {"grad_norm": "gradient norm", "param_norm": "parameters' norm"}
MUST_BE_FINITE = ("loss", "grad_norm", "param_norm")  # the last one's step is saved only if it is
SHORT = 5  # a run's last stretch with fewer steps says no speed of its own
PROFILED = (3, 6)  # steps after the start between which ``--profile`` traces


class Diverged(UserError):
    """A loss or gradient that is no longer a finite number."""


class Monitor:
    """One attempt at a run, from ``step`` on. peak: FLOP/s of the mesh at best, or None where unknown."""

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: Checkpointer,
        *,
        step: int,
        peak: float | None,
        progress: Progress,
        watchdog: Watchdog,
        profile: bool = False,
    ) -> None:
        progress = progress if hosts.first() else Silent()
        self.experiment, self.checkpoints, self.peak, self.progress = experiment, checkpoints, peak, progress
        self.writer = MetricsWriter(checkpoints.directory, step=step) if hosts.first() else Unwritten()
        self._waiting: tuple[int, Metrics] | None = None
        self._seconds = self.writer.seconds
        self._first = step + 1  # its time holds the compilation: it is a stretch of its own
        self._stretch = [step, 0.0]  # steps done at the last line, and seconds of the steps since
        self._speed: dict[str, Any] = {}
        first, end = (min(step + at, experiment.steps) for at in PROFILED)
        self._profiled = range(first, end) if profile and hosts.first() else range(0)
        self._tracing = False
        if profile and hosts.first() and not self._profiled:
            progress.note(f"nothing to profile: tracing begins at step {step + PROFILED[0] + 1}, beyond the run's end.")
        self._watchdog = watchdog
        progress.start(experiment.name, total=experiment.steps, step=step)
        self._clock = time.perf_counter()

    def expect(self, what: str, step: int, *, patient: bool = False) -> None:
        """Says what the run waits for now, for when it never comes. The first step compiles: it may take long."""
        self._watchdog.expect(f"{what} {step}", patient=patient or step == self._first)

    def watch(self, step: int, measured: Metrics) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the one before while it runs."""
        before, self._waiting = self._waiting, (step, measured)
        if before is not None:
            self._read(*before)

    def flush(self) -> None:
        """Reads what is waiting: after it every step so far is known to be good."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._read(*waiting)

    def _read(self, step: int, measured: Metrics) -> None:
        values = jax.device_get(measured)  # blocks until the step is done, so that its time is true
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._stretch[1] += now - self._clock
        self._clock = now
        experiment = self.experiment
        tokens = step * experiment.tokens_per_step
        bad = [name for name in MUST_BE_FINITE if not math.isfinite(float(values[name]))]
        due = bool(bad) or step == 1 or step % experiment.log_every == 0 or step == experiment.steps
        steps = step - self._stretch[0]
        if step == self._first or (due and steps >= min(experiment.log_every, SHORT)):
            # over the steps since then: one short step alone would measure when this host looked
            seconds = self._stretch[1] / steps
            self._stretch = [step, 0.0]
            rate = experiment.tokens_per_step / seconds
            self._speed = {
                "step_seconds": seconds,
                "tokens_per_second": rate,
                "peak_share": rate * experiment.flops_per_token / self.peak if self.peak else None,
            }
        if due:
            spent = {"tokens": tokens, "flops": tokens * experiment.flops_per_token}
            self.writer.write(step, {**spent, **values, "seconds": self._seconds, **self._speed})
        self.progress.update(step, {**values, **self._speed})
        if bad:
            raise self._diverged(step, bad[0], float(values[bad[0]]))

    def _diverged(self, step: int, name: str, value: float) -> Diverged:
        last = self.checkpoints.last()
        rate = self.experiment.optimizer.learning_rate(self.experiment.clock, step - 1)
        return Diverged(
            f"The {WORDS.get(name, name)} of {self.experiment.name} became {value} at step {step}, at a learning rate "
            f"of {rate:.3g}; "
            f"{f'the last good checkpoint is {last}' if last else 'there is no checkpoint before it'}: lower the "
            "learning rate or lengthen the warm-up."
        )

    def evaluated(self, step: int, found: Metrics) -> None:
        """Writes an evaluation's results. Its time is not counted as the next step's."""
        values = {name: float(value) for name, value in jax.device_get(found).items()}
        self.writer.write(step, values)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(step, bad[0], values[bad[0]])
        self.resume_clock()

    def resume_clock(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now

    @contextlib.contextmanager
    def traced(self, step: int) -> Iterator[None]:
        """Traces the steps that ``--profile`` asks for into the run's ``profile`` folder."""
        if self._profiled and step == self._profiled.start:
            self.flush()
            jax.profiler.start_trace(str(self.checkpoints.directory / "profile"))
            self._tracing = True
        yield
        if self._profiled and step == self._profiled.stop - 1:
            self.flush()
            self._stop_trace()
            steps = f"{self._profiled.start + 1} to {self._profiled.stop}"
            self.progress.note(f"profile of steps {steps}: {self.checkpoints.directory / 'profile'}")

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stop_trace()
        self.progress.stop()
        self.writer.close()
