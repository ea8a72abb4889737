# SPDX-License-Identifier: Apache-2.0
"""Watches a run: reads each step's metrics once the next step is under way, times it, writes, shows, and stops
a run whose numbers are no longer numbers."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from research.core.types import Metrics, UserError
from research.train.checkpoint import Checkpointer
from research.train.experiment import Experiment
from research.train.metrics import MetricsWriter
from research.train.progress import Progress

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
        profile: bool,
    ) -> None:
        self.experiment, self.checkpoints, self.peak, self.progress = experiment, checkpoints, peak, progress
        self.writer = MetricsWriter(checkpoints.directory, step=step)
        self._waiting: tuple[int, Metrics] | None = None
        self._seconds = self.writer.seconds
        self._first = step + 1  # its time holds the compilation: it is a stretch of its own
        self._stretch = [step, 0.0]  # steps done at the last line, and seconds of the steps since
        self._speed: dict[str, Any] = {}
        self._profiled = range(step + PROFILED[0], step + PROFILED[1]) if profile else range(0)
        progress.start(experiment.name, total=experiment.steps, step=step)
        self._clock = time.perf_counter()

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
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(float(values[name]))]
        due = bool(bad) or step == 1 or step % experiment.log_every == 0 or step == experiment.steps
        if due or step == self._first:
            # over the steps since then: one short step alone would measure when this host looked
            seconds = self._stretch[1] / (step - self._stretch[0])
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
            raise self._diverged(step, bad[0], values)

    def _diverged(self, step: int, name: str, values: Metrics) -> Diverged:
        last = self.checkpoints.last()
        return Diverged(
            f"The {name.replace('grad_norm', 'gradient norm')} of {self.experiment.name} became "
            f"{float(values[name])} at step {step}, at a learning rate of {float(values['learning_rate']):.3g}; "
            f"{f'the last good checkpoint is {last}' if last else 'there is no checkpoint before it'}: lower the "
            "learning rate or lengthen the warm-up."
        )

    def evaluated(self, step: int, found: Metrics) -> None:
        """Writes an evaluation's results. Its time is not counted as the next step's."""
        self.writer.write(step, jax.device_get(found))
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
        yield
        if self._profiled and step == self._profiled.stop - 1:
            self.flush()
            jax.profiler.stop_trace()
            self.progress.note(f"profile of steps {list(self._profiled)}: {self.checkpoints.directory / 'profile'}")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.progress.stop()
        self.writer.close()
