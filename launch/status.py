# SPDX-License-Identifier: Apache-2.0
"""``lab status``, ``lab logs``, ``lab cancel``: what the journals of sweeps say, read without JAX."""

import argparse
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import journal as journals
from launch import store
from launch.journal import Journal, Patience, RunState, states
from research.core.errors import UserError

RESULT, METRICS, RECORD = "result.json", "metrics.jsonl", "experiment.json"  # as the loop names them


@dataclass(frozen=True)
class Row:
    """One run in ``lab status``."""

    name: str
    state: str
    where: str
    step: str
    loss: str
    spent: str
    counts: str
    detail: str


def rows(journal: Journal, directory: Path, known: Mapping[str, RunState]) -> list[Row]:
    return [_row(run, directory / run.name) for run in known.values()]


def _row(run: RunState, directory: Path) -> Row:
    last = last_line(directory / METRICS) if run.state in ("running", "finished", "failed", "waiting") else {}
    task, now = run.task, time.time()
    where = task.place.removesuffix(f" of {socket.gethostname()}") if task is not None else ""
    if task is not None and task.live and task.on != "local":
        where += f" ({task.name})"
    spent = ""
    if task is not None and task.active is not None:
        spent = duration((task.ended or now) - task.active)
    state, detail = run.state, run.detail
    if run.state == "waiting" and run.until > now:
        detail = f"again in {run.until - now:.0f} s" + (f"; {detail}" if detail else "")
    if task is not None and task.live and task.state != "active":
        state = {"intended": "asked for", "submitted": "asked for", "ending": "ending"}[task.state]
    counted = ", ".join(f"{what}: {count}" for what, count in run.counts.items() if count)
    loss = last.get("validation/loss", last.get("loss"))
    step = f"{last['step']:,}" if "step" in last else ""
    return Row(run.name, state, where, step, f"{loss:.4f}" if isinstance(loss, float) else "", spent, counted, detail)


def duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def last_line(path: Path) -> dict[str, Any]:
    """Of a file of JSON lines; empty where there is none."""
    try:
        if store.is_remote(path):
            text = path.read_text()
        else:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 65_536))
                text = file.read().decode(errors="replace")
    except OSError:
        return {}
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def table(found: Sequence[Row], title: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    colours = {"finished": "green", "running": "cyan", "failed": "bold red", "cancelled": "yellow"}
    shown = Table("run", "state", "where", "step", "loss", "time", "again", "detail", title=title, title_justify="left")
    for row in found:
        style = colours.get(row.state, "")
        state = f"[{style}]{row.state}[/]" if style else row.state
        cells = (row.where, row.step, row.loss, row.spent, row.counts, row.detail[:200])
        shown.add_row(escape(row.name), state, *(escape(cell) for cell in cells))
    return shown


# --- the commands -------------------------------------------------------------------------------


def sweeps(runs: Path, study: str | None) -> list[Path]:
    """Folders with a journal: the one of a study file or folder name, or all. Raises UserError where there is none."""
    if study is not None:
        for name in (study, folder_name(study)):
            if (runs / name / journals.FOLDER / journals.SWEEP).exists():
                return [runs / name]
        raise UserError(f"{runs / folder_name(study)} has no journal of a sweep: lab sweep STUDY --on ... begins one.")
    found = [runs / name for name in store.names(runs) if (runs / name / journals.FOLDER / journals.SWEEP).exists()]
    if not found:
        raise UserError(f"{runs} has no sweep's journal: lab sweep STUDY --on ... begins one (--runs: another folder).")
    return found


def folder_name(study: str) -> str:
    """The folder of a study without overrides, as ``launch.study`` names it."""
    path, _, function = study.partition(":")
    return Path(path).stem + (f"-{function}" if function and function != "sweep" else "")


def known(journal: Journal, directory: Path) -> dict[str, RunState]:
    """From the journal and the results alone: what has a result is finished."""
    about = journal.about()
    finished = {name for name in about["runs"] if (directory / name / RESULT).exists()}
    patience = Patience(**about.get("patience", {}))
    return states(about["runs"], journal.tasks(), finished, journal.cancelled(), patience, about.get("version", ""))


def command(options: argparse.Namespace) -> int:
    """``lab status``."""
    return show(options.runs, options.study, as_json=options.json)


def show(runs: Path, study: str | None, *, as_json: bool = False) -> int:
    """Prints every run of one sweep, or of all."""
    from rich.console import Console

    told = {}
    for directory in sweeps(runs, study):
        journal = Journal(directory)
        found = known(journal, directory)
        tasks = journal.tasks()
        told[directory.name] = [{**vars(row)} for row in rows(journal, directory, found)]
        if not as_json:
            console = Console(width=None if sys.stdout.isatty() else 160)
            console.print(table(rows(journal, directory, found), directory.name))
            hours = sum(task.chip_hours for task in tasks)
            spent = f"; {hours:.3g} chip-hours" if hours else ""
            counts = {state: sum(run.state == state for run in found.values()) for state in
                      sorted({run.state for run in found.values()})}  # fmt: skip
            print(", ".join(f"{n} {state}" for state, n in counts.items()) + f"; tasks so far: {len(tasks)}{spent}")
            if {"waiting", "assigned", "running"} & set(counts) and not journal.followed():
                print("no process follows this sweep now: repeat its lab sweep command to go on")
    if as_json:
        print(json.dumps(told))
    return 0
