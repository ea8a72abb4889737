# SPDX-License-Identifier: Apache-2.0
"""A whole study: run what is not finished, smallest first, then analyse."""

import sys
import time
from pathlib import Path

from launch import collect, local
from launch.study import Study
from research.core.types import UserError
from research.scaling.table import write_csv


def sweep(study: Study, directory: Path) -> int:
    """Runs every unfinished experiment; one that fails does not stop the others. Returns the exit code."""
    names = sorted(study.experiments, key=lambda name: study.experiments[name].flops)
    begun, failed = time.monotonic(), []
    for position, name in enumerate(names, start=1):
        experiment = study.experiments[name]
        state, _ = collect.status(experiment, directory / name)
        if state == "finished":
            say(f"[{position}/{len(names)}] {name}: finished before")
            continue
        say(f"[{position}/{len(names)}] {name}: {experiment.steps} steps, {experiment.flops:.3g} FLOPs")
        try:
            local.run(experiment, directory / name)
        except UserError as error:
            failed.append(name)
            say(f"[{position}/{len(names)}] {name}: {error}")
    say(f"{len(names) - len(failed)} of {len(names)} runs finished, {time.monotonic() - begun:.0f} s")
    if study.analyze is not None:
        analyze(study, directory)
    return 1 if failed else 0


def analyze(study: Study, directory: Path) -> None:
    """The study's own analysis of what has finished so far, written into the study's folder."""
    if study.analyze is None:
        raise UserError(f"{study.reference} has no function analyze(runs, out): there is nothing to conclude.")
    runs = collect.table(study, directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(runs, directory / "table.csv")
    study.analyze(runs, directory)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
