# SPDX-License-Identifier: Apache-2.0
"""Anybody's CSV of runs as a table: named columns, numbers with units, and a stated reason for every row left out.

Two of params, tokens and FLOPs are enough: the third follows from FLOPs = 6 params tokens, which the table then says.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from research.core.types import UserError
from research.scaling.table import REQUIRED, STATUSES, Run, Table, read_csv

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
WORDS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
OF_WHAT = r"(?:params?|parameters?|tokens?|flops?|nats?(?:/token)?)?"
NUMBER = re.compile(rf"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-z]*?)\s*{OF_WHAT}", re.IGNORECASE)
WORSE = 0.10  # above a smaller model's loss on fewer tokens: the run diverged
GUESSES = {
    "params": ("params", "parameters", "n_params", "num_params", "model_size", "model size", "n"),
    "tokens": ("tokens", "n_tokens", "num_tokens", "training_tokens", "training tokens", "d"),
    "flops": ("flops", "flop", "compute", "training_flops", "training flop", "training flops", "c"),
    "loss": ("loss", "val_loss", "validation_loss", "validation loss", "eval_loss", "final_loss"),
    "name": ("name", "run", "id"),
    "status": ("status", "state"),
}


@dataclass(frozen=True)
class Imported:
    """A CSV as a table. notes: what was taken how, and which rows are left out of it, a sentence each."""

    table: Table
    notes: tuple[str, ...]


def read(path: Path | str, *, columns: Mapping[str, str | None] | None = None, drop_highest: int = 0) -> Imported:
    """Reads a CSV with ``columns`` naming those of params, tokens, flops, loss, name and status; the usual names are
    found by themselves, and a table of this project is read whole.

    drop_highest: so many rows of the highest loss are left out. Rows that cannot be used are kept with the status
    that says why, or named in the notes where they are no runs at all. Raises UserError for a file that cannot be read,
    a column that is absent, and where no row can be used.
    """
    given = {key: name for key, name in (columns or {}).items() if name}
    rows, header = _rows(path)
    if not given and set(REQUIRED) <= set(header):
        table, notes = read_csv(path), []
    else:
        table, notes = _table(rows, _columns(header, given, path), path)
    table, dropped = _drop_highest(table, drop_highest)
    table, doubts = clean(table)
    return Imported(table, (*notes, *dropped, *doubts))


def _rows(path: Path | str) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader), [name.strip() for name in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file ({error}): give the path of a table of runs.") from error


def _columns(header: Sequence[str], given: Mapping[str, str], path: Path | str) -> dict[str, str]:
    has = ", ".join(repr(name) for name in header) or "none"
    for key, name in given.items():
        if name not in header:
            raise UserError(f"{path} has no column {name!r} for {key}; its columns are {has}.")
    found = dict(given)
    for key, names in GUESSES.items():
        usual = next((name for name in header if name.lower() in names), None)
        if key not in found and usual is not None and usual not in given.values():
            found[key] = usual
    if len({"params", "tokens"} & set(given)) == 1 and "flops" in given:  # two were named: the third follows
        found = {key: name for key, name in found.items() if key in given or key not in ("params", "tokens")}
    if "loss" not in found:
        raise UserError(f"{path} needs a column of losses: name it with --loss-column; its columns are {has}.")
    if len({"params", "tokens", "flops"} & set(found)) < 2:
        absent = [key for key in ("params", "tokens", "flops") if key not in found]
        options = " or ".join(f"--{key}-column" for key in absent)
        raise UserError(f"{path} needs two of params, tokens and FLOPs: name a column with {options}; it has {has}.")
    return found


def number(text: str) -> float:
    """A number, with or without thousands' commas and a unit: 70B, 1.4 trillion tokens, 5.76e23 FLOPs. NaN for "nan"
    and for no text. Raises ValueError for other text."""
    text = text.strip().replace(",", "").replace("_", "")
    if text.lower() in ("", "nan", "na", "n/a", "none", "null", "-"):
        return math.nan
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return math.inf
    match = NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in UNITS | WORDS:
        raise ValueError(text)
    return float(match[1]) * (UNITS | WORDS)[unit]


def _table(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str], path: Path | str) -> tuple[Table, list[str]]:
    runs, notes, units, names = [], [], 0, set()
    strange: list[str] = []
    for line, row in enumerate(rows, start=2):
        values, problem = {}, None
        for key in ("params", "tokens", "flops", "loss"):
            text = (row.get(columns.get(key, "")) or "") if key in columns else ""
            try:
                values[key] = number(text)
                units += bool(text) and bool(
                    re.search(r"[a-z]", re.sub(r"e[-+]?\d+|nan|inf", "", text, flags=re.I), re.I)
                )
            except ValueError:
                values[key], problem = math.nan, f"line {line}: the {key} is {text!r}, which is not a number"
        if problem is None:
            problem = _follow(values, columns, line)
        if problem is not None:
            strange.append(problem)
            continue
        name = (row.get(columns.get("name", "")) or "").strip() or f"line-{line}"
        name = name if name not in names else f"{name} (line {line})"
        names.add(name)
        status = (row.get(columns.get("status", "")) or "").strip().lower() or "finished"
        loss = values["loss"]
        runs.append(
            Run(
                name=name, params=round(values["params"]), non_embedding_params=round(values["params"]),
                tokens=round(values["tokens"]), flops=values["flops"], loss=loss,
                status=status if status in STATUSES else "failed",
            )
        )  # fmt: skip
    if not runs:
        reasons = f": {strange[0]}" if strange else ": it has no rows"
        raise UserError(f"No row of {path} can be used{reasons}.")
    third = next((key for key in ("flops", "tokens", "params") if key not in columns), None)
    if third is not None:
        notes.append(f"There is no column of {third}: they follow from FLOPs = 6 params tokens.")
    if units:
        notes.append(f"{units} cells were read with their units, 70B as 7e10.")
    notes += [f"Left out: {problem}." for problem in strange[:10]]
    if len(strange) > 10:
        notes.append(f"Left out: {len(strange) - 10} more lines without usable numbers.")
    return Table(tuple(runs)), notes


def _follow(values: dict[str, float], columns: Mapping[str, str], line: int) -> str | None:
    """Fills in the one of params, tokens and flops that has no column; what is wrong with the others, if anything."""
    for key in ("params", "tokens", "flops"):
        if key in columns and not (math.isfinite(values[key]) and values[key] > 0):
            return f"line {line}: the {key} is {values[key]}, and a positive number is needed"
    if "flops" not in columns:
        values["flops"] = 6 * values["params"] * values["tokens"]
    elif "tokens" not in columns:
        values["tokens"] = values["flops"] / (6 * values["params"])
    elif "params" not in columns:
        values["params"] = values["flops"] / (6 * values["tokens"])
    return None


def _drop_highest(table: Table, count: int) -> tuple[Table, list[str]]:
    if count < 0:
        raise UserError(f"--drop-highest-loss must be at least 0; given {count}.")
    good = [run for run in table if run.problem is None]
    if not count:
        return table, []
    if count >= len(good):
        raise UserError(f"--drop-highest-loss {count} would leave none of the {len(good)} runs.")
    dropped = sorted(good, key=lambda run: run.loss)[-count:]
    names = {run.name for run in dropped}
    lowest = min(run.loss for run in dropped)
    told = f"The {count} runs of the highest loss ({lowest:.4g} and above) are left out: {', '.join(sorted(names))}."
    return Table(tuple(run for run in table if run.name not in names)), [told]


def clean(table: Table) -> tuple[Table, tuple[str, ...]]:
    """The table without copies of a run, and with the status "diverged" for those that are far worse than a smaller
    model on fewer tokens; and what was done, a sentence each. Repeats that differ in loss (other seeds) stay."""
    runs, notes, seen = [], [], {}
    for run in table:
        key = (run.params, run.tokens, run.flops, run.loss)
        if run.problem is None and key in seen:
            notes.append(f"{run.name} is left out: a copy of {seen[key]}, with the same size, tokens and loss.")
            continue
        seen.setdefault(key, run.name)
        runs.append(run)
    good = [run for run in runs if run.problem is None]
    for index, run in enumerate(runs):
        if run.problem is not None:
            continue
        less = [o for o in good if o.params <= run.params and o.tokens <= run.tokens and o.name != run.name]
        better = min(less, key=lambda o: o.loss, default=None)
        if better is not None and run.loss > better.loss * (1 + WORSE):
            runs[index] = replace(run, status="diverged")
            notes.append(
                f"{run.name} is taken to have diverged: its loss {run.loss:.4g} is "
                f"{run.loss / better.loss - 1:.0%} above "
                f"that of {better.name}, which is no larger and saw no more tokens."
            )
    seeds = len(good) - len({(run.params, run.tokens) for run in good})
    if seeds:
        notes.append(f"{seeds} runs repeat another's size and tokens with another loss (seeds): all count.")
    return Table(tuple(runs)), tuple(notes)
