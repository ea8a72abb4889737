# SPDX-License-Identifier: Apache-2.0
"""The executors by name: made from the command's options, or again from what the journal says of a sweep."""

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import status
from launch.executor import Executor, Unreachable
from launch.journal import Journal, Patience
from launch.workers import Workers, lab
from research.core.errors import UserError

BACKOFF = {"local": 5.0, "tpu-vm": 30.0, "sky": 30.0}
POLL = {"local": 0.5, "tpu-vm": 15.0, "sky": 15.0}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the journal must know to make the executor again: for lab logs, lab cancel, lab gc."""
    return {"on": options.on, "parallel": parallel(options)}


def parallel(options: argparse.Namespace) -> int:
    count = options.parallel if options.parallel is not None else (os.cpu_count() or 1) if options.on == "local" else 1
    if count < 1:
        raise UserError(f"--parallel {count}: give 1 or more.")
    return count


def make(on: str, journal: Journal, runs: Path, about: dict[str, Any]) -> Executor:
    """about: the sweep's record in the journal."""
    overrides = [word for assignment in about["overrides"] for word in ("--set", assignment)]
    run = ["run", about["study"], *overrides, *about.get("words", ())]
    if on == "local":
        return Workers(journal, lab("--runs", str(runs), *run), about["parallel"])
    raise UserError(f"There is no executor {on!r}: choose local, tpu-vm or sky.")


def sweep(study: Any, options: argparse.Namespace) -> int:
    """Hands the study to the executor, follows it to its end, and analyses it."""
    from launch import submit
    from launch import sweep as sweeps

    backoff = options.backoff if options.backoff is not None else BACKOFF[options.on]
    if options.retries < 0 or backoff < 0:
        raise UserError(f"--retries {options.retries} and --backoff {backoff:g} must be at least 0.")
    patience = Patience(retries=options.retries, backoff=backoff)
    directory = options.runs / study.name
    about = {
        "study": study.reference, "overrides": list(study.overrides), "runs": list(study.experiments),
        "words": ["--stall-minutes", f"{options.stall_minutes:g}"], "patience": asdict(patience), **settings(options),
    }  # fmt: skip
    code = submit.sweep(
        study, directory, lambda journal: make(options.on, journal, options.runs, about), about=about,
        patience=patience, poll=options.poll if options.poll is not None else POLL[options.on],
    )  # fmt: skip
    if study.analyze is not None:
        sweeps.analyze(study, directory)
    return code


def executor(journal: Journal, runs: Path, on: str | None = None) -> Executor:
    """That of a sweep that was begun before."""
    about = journal.about()
    return make(on or about["on"], journal, runs, about)


def logs(options: argparse.Namespace) -> int:
    """Prints a run's output; with ``--follow`` as it grows, until the run is over."""
    (directory,) = status.sweeps(options.runs, options.study)
    journal = Journal(directory)
    shown, last = 0, ""
    while True:
        tasks = [task for task in journal.tasks() if options.run in task.runs]
        if not tasks:
            names = ", ".join(journal.about()["runs"][:20])
            raise UserError(f"Nothing was begun for {options.run!r} in {directory}: its runs are {names}.")
        task = tasks[-1]
        paths = executor(journal, options.runs, task.on).logs(task, options.run)
        if options.host >= len(paths):
            raise UserError(f"{task.name} has {len(paths)} logs of hosts: --host counts from 0.")
        path = paths[options.host]
        if str(path) != last:
            shown, last = 0, str(path)
        text = path.read_text(errors="replace") if path.exists() else ""
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if not options.follow or not (task.live and options.run not in task.outcomes):
            return 0
        time.sleep(1.0)


def cancel(options: argparse.Namespace) -> int:
    """Ends runs: writes it down for a process that submits, and ends what is live itself."""
    (directory,) = status.sweeps(options.runs, options.study)
    journal = Journal(directory)
    known = set(journal.about()["runs"])
    if unknown := set(options.run) - known:
        raise UserError(
            f"{directory} has no run {', '.join(sorted(unknown))}: its runs are {', '.join(sorted(known))}."
        )
    journal.cancel(options.run or ["*"])
    wanted, deadline = set(options.run) or known, time.monotonic() + 120
    live = [task for task in journal.tasks() if task.live and set(task.runs) <= wanted]
    left = list(live)
    while left and time.monotonic() < deadline:
        left = [task for task in left if not _cancelled(executor(journal, options.runs, task.on), task)]
        time.sleep(0.2 if left else 0)
    print(
        f"cancelled {len(wanted)} runs; {len(live) - len(left)} of {len(live)} live tasks have ended", file=sys.stderr
    )
    return 1 if left else 0


def _cancelled(made: Executor, task: Any) -> bool:
    try:
        return made.cancel(task)
    except Unreachable as error:
        print(f"{task.name}: {error}", file=sys.stderr)
        return False
