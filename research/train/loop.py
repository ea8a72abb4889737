# SPDX-License-Identifier: Apache-2.0
"""The training loop: ``run(experiment, directory)`` takes an experiment from nothing, or from its last
checkpoint, to its end."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core import sharding
from research.core.errors import Interrupted
from research.core.files import read_json, write_json
from research.core.types import Context, EvalRun, Stream, UserError
from research.scaling import cost
from research.train import hardware, hosts, metrics, provenance, watchdog, weights
from research.train.checkpoint import RECORD, RESULT, Checkpointer, check_unchanged
from research.train.experiment import CheckpointPolicy, Experiment
from research.train.interrupt import Interrupt
from research.train.monitor import Monitor
from research.train.progress import Progress, Silent
from research.train.start import Program, check_fits, first_state
from research.train.state import TrainState
from research.train.watchdog import Watchdog


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: where caches lie, what to show, whether to trace a few steps, after how many
    minutes without progress to give up (0: never), and where checkpoints go."""

    cache_dir: Path
    progress: Progress = field(default_factory=Silent)
    profile: bool = False
    stall_minutes: float = watchdog.MINUTES
    checkpointer: Callable[[Path, CheckpointPolicy], Checkpointer] = Checkpointer


def run(experiment: Experiment, directory: Path, options: Options) -> dict[str, Any]:
    """Trains to the end and returns the result, which is also written to ``directory/result.json``.

    A finished run is left as it is; one that holds checkpoints is gone on with. Raises UserError for what the
    user can mend, Diverged for a loss that is not finite, and Interrupted after saving when a signal asked.
    """
    hosts.check_equal("experiment", experiment.record())
    if (done_before := hosts.from_first(lambda: look(experiment, directory))) is not None:
        return done_before
    with hosts.together():
        mesh = sharding.make_mesh(experiment.mesh)
        check_fits(experiment, mesh)
        hosts.check(mesh)
        peak = hardware.peak_flops(mesh, options.cache_dir) if hosts.first() else None
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        context = Context(mesh, experiment.seed, options.cache_dir, program.frozen, directory)
        stream, evals = hosts.in_turn(lambda: prepare(experiment, context), folder=options.cache_dir)
        hosts.check_equal("data", stream.get_state())
        with Watchdog(experiment.name, options.stall_minutes) as watchdog:
            hosts.from_first(lambda: write_json(directory / RECORD, experiment.record()))
            with contextlib.closing(options.checkpointer(directory, experiment.checkpoint)) as checkpoints:
                if not checkpoints.remote:
                    hosts.check_shared(directory)
                state = first_state(program, checkpoints, stream)
                done = int(state.step)
                with hosts.together():
                    if hosts.first():
                        provenance.record(directory, mesh, step=done, extra={"data": stream.info})
                monitor = Monitor(
                    experiment, checkpoints, step=done, peak=peak, progress=options.progress, profile=options.profile,
                    watchdog=watchdog,
                )  # fmt: skip
                with monitor, Interrupt() as interrupt:
                    train(program, state, stream, evals, checkpoints, monitor, interrupt)
                    result = hosts.from_first(lambda: finish(experiment, directory, stream, checkpoints.home))
    if (signum := interrupt.asked_last()) is not None:  # during the last step: the run is done, its caller is to stop
        raise Interrupted(experiment.name, step=experiment.steps, signum=signum)
    return result


def look(experiment: Experiment, directory: Path) -> dict[str, Any] | None:
    """The result of a run that is done; else None. Raises UserError for an experiment that cannot go on there."""
    experiment.check()
    if (previous := read_json(directory / RECORD)) is not None:
        check_unchanged(previous, experiment.record(), directory)
    return read_json(directory / RESULT)


def prepare(experiment: Experiment, context: Context) -> tuple[Stream, list[EvalRun]]:
    """What a run draws from and is measured by; fills the cache."""
    stream = experiment.source.start(context)
    for source in experiment.sources:
        size = source.vocab_size(context.cache_dir)
        experiment.model.check(sequence_length=source.sequence_length, vocab_size=size)
    return stream, [evaluation.start(context) for evaluation in experiment.evals]


def train(
    program: Program,
    state: TrainState,
    stream: Stream,
    evals: Sequence[EvalRun],
    checkpoints: Checkpointer,
    monitor: Monitor,
    interrupt: Interrupt,
) -> None:
    """Steps from where ``state`` stands to the experiment's end."""
    experiment, total = program.experiment, program.experiment.steps
    clock, optimizer = experiment.clock, experiment.optimizer
    for index in range(int(state.step), total):
        now = index + 1
        monitor.expect("the batch of step", now)
        batch = stream.next(program.bind(state), index)
        monitor.expect("step", now)
        with monitor.traced(index):
            rate = np.float32(optimizer.learning_rate(clock, index))
            state, measured = program.step(state, program.frozen, batch, rate)
            monitor.watch(now, {**measured, **stream.report()})
        signum = interrupt.asked()
        leaving = signum is not None and now < total
        saving = leaving or is_due(experiment.checkpoint.every, now, total)
        due = [run for run, spec in zip(evals, experiment.evals, strict=True) if is_due(spec.every, now, total)]
        if due or saving:
            monitor.flush()  # raises if the step just done is bad: it is neither evaluated nor saved
        for evaluate in due:
            monitor.expect("an evaluation after step", now, patient=True)
            monitor.evaluated(now, evaluate(program.bind(state), now))
        if saving:
            monitor.expect("the checkpoint of step", now, patient=True)
            checkpoints.save(now, state, stream.get_state(), experiment.record())
            monitor.resume_clock()
        if leaving:
            checkpoints.wait()
            raise Interrupted(experiment.name, step=now, signum=signum or 0)
    checkpoints.wait()


def is_due(every: int, now: int, total: int) -> bool:
    """At multiples of ``every`` and at the end; 0 is at the end only."""
    return now == total or (every > 0 and now % every == 0)


def finish(experiment: Experiment, directory: Path, stream: Stream, home: Path) -> dict[str, Any]:
    """Gathers what the last step's lines of metrics say into the run's result, and writes it.
    home: the folder that its checkpoints lie in."""
    last: dict[str, Any] = {}
    for line in metrics.read(directory):
        if line["step"] == experiment.steps:
            last |= line
    if "loss" not in last:
        raise UserError(
            f"{directory / metrics.FILE} has no line for the last step, {experiment.steps}: remove {directory} "
            "to run again."
        )
    params = cost.params(experiment.model)
    held_out = [f"{name}/{what}" for name in experiment.eval_names for what in ("cross_entropy", "loss")]
    bits = [f"{name}/bits_per_byte" for name in experiment.eval_names]
    result = {
        "name": experiment.name,
        "hash": experiment.hash,
        "status": "finished",
        "params": params.total,
        "non_embedding_params": params.non_embedding,
        "tokens": experiment.tokens,
        "flops": experiment.flops,
        "loss": next((last[name] for name in held_out if name in last), None),  # of the first eval that has one
        "bits_per_byte": next((last[name] for name in bits if name in last), None),
        "seconds": last.get("seconds"),
        "metrics": {name: value for name, value in last.items() if not isinstance(value, list)},
        "data": stream.info,
        "weights": weights.content(home),
    }
    write_json(directory / RESULT, result)
    return result
