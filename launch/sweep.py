# SPDX-License-Identifier: Apache-2.0
"""A whole study: run what is not finished, smallest first, then analyse."""

import functools
import sys
import time
from pathlib import Path

from launch import collect, distributed, host, local
from launch.host import OUT_OF_SPACE
from launch.journal import Journal
from launch.study import Study, told
from research.core.types import UserError
from research.data.pipeline import PackedSource
from research.recipes import graph
from research.scaling.ladder import TOLERANCE
from research.scaling.table import write_csv
from research.train import hosts, watchdog
from research.train.checkpoint import brief
from research.train.experiment import Experiment, Flops
from research.train.mirror import Mirror
from research.train.monitor import Diverged
from research.train.places import is_remote


def sweep(study: Study, directory: Path, *, stall_minutes: float = watchdog.MINUTES) -> int:
    """Runs every unfinished experiment; one that fails does not stop the others. Returns the exit code."""
    hosts.from_first(lambda: check_not_submitted(directory))
    names = graph.order(study.experiments)
    for name in names:
        hosts.from_first(functools.partial(check_corpus, study.experiments[name], directory / name))
    begun, failed = time.monotonic(), []
    for position, name in enumerate(names, start=1):
        try:
            experiment = settled(study, name, directory)
        except graph.Waiting as error:  # what it begins from has failed
            failed.append(name)
            say(f"[{position}/{len(names)}] {name}: {error}")
            continue
        state, _ = hosts.from_first(functools.partial(collect.status, experiment, directory / name))
        if state == "finished":
            say(f"[{position}/{len(names)}] {name}: finished before")
            continue
        size = f"{experiment.steps} steps, {experiment.flops:.3g} FLOPs{off_length(experiment)}"
        say(f"[{position}/{len(names)}] {name}: {size}")
        try:
            local.run(experiment, directory / name, stall_minutes=stall_minutes)
        except UserError as error:
            if hosts.several() and not isinstance(error, Diverged | hosts.HostsError):
                raise  # on this host alone: the others are in the midst of the run
            failed.append(name)
            say(f"[{position}/{len(names)}] {name}: {error}")
        except Exception as error:  # one run's crash must not end the sweep; its failure.json has the whole text
            if hosts.several() or isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
                raise
            failed.append(name)
            say(f"[{position}/{len(names)}] {name}: {type(error).__name__}: {brief(error)}")
    say(f"{len(names) - len(failed)} of {len(names)} runs finished, {time.monotonic() - begun:.0f} s")
    writes = hosts.first()
    distributed.stop()  # which no host does before all are done; an analysis may take long
    if study.analyze is not None and writes:
        analyze(study, directory)
    return 1 if failed else 0


def settled(study: Study, name: str, directory: Path) -> Experiment:
    """A run with what it begins from, as the first host sees it. Raises ``graph.Waiting``."""
    told = hosts.from_first(lambda: _outputs(study, name, directory))
    if isinstance(told, str):
        raise graph.Waiting(told)
    return graph.filled(study.only(name), directory, told)


def _outputs(study: Study, name: str, directory: Path) -> dict[str, str] | str:
    try:
        return graph.outputs(study.only(name), directory, study.experiments)
    except graph.Waiting as error:
        return str(error)


def check_not_submitted(directory: Path) -> None:
    """Raises UserError where an executor has runs of the study in hand: they would be done twice."""
    if live := [task for task in Journal(directory).tasks() if task.live]:
        raise UserError(
            f"{live[0].name} has {', '.join(live[0].runs)} in hand: go on with --on {live[0].on}, or lab cancel "
            f"{directory.name} first."
        )


def check_corpus(experiment: Experiment, directory: Path) -> None:
    """Raises UserError where a finished run was trained on text that has changed since: a law needs one text."""
    experiment = graph.as_far_as_known(experiment, directory.parent)
    _, result = collect.status(experiment, directory)
    before = result.get("data", {}).get("corpus_hash")
    if before is not None and isinstance(experiment.source, PackedSource):
        now = experiment.source.corpus.fingerprint(host.cache_dir())
        if now != before:
            raise UserError(
                f"{directory} was trained on text with the content hash {before}, which is now {now}: put the text "
                f"back, or remove {directory.parent} to run the study on the new text."
            )


def off_length(experiment: Experiment) -> str:
    """Says so where whole steps miss the experiment's length in FLOPs by more than a ladder allows."""
    if not isinstance(experiment.length, Flops):
        return ""
    off = experiment.flops / experiment.length.count - 1
    return f" ({off:+.1%} against its length of {experiment.length.count:.3g})" if abs(off) > TOLERANCE else ""


def analyze(study: Study, directory: Path) -> None:
    """The study's own analysis of what has finished so far, written into the study's folder."""
    if study.analyze is None:
        raise UserError(f"{study.reference} has no function analyze(runs, out): there is nothing to conclude.")
    runs, out, mirror = collect.table(study, directory), directory, None
    if is_remote(directory):
        out = host.mirrored(directory)
        mirror = Mirror(directory, out)
        mirror.fetch()
    out.mkdir(parents=True, exist_ok=True)
    write_csv(runs, out / "table.csv")
    with told(study.reference):
        study.analyze(runs, out)
    if mirror is not None:
        mirror.send()
    say(f"results are in {directory}")


def say(text: str) -> None:
    if hosts.first():
        print(text, file=sys.stderr, flush=True)
