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

import numpy as np

from research.core.types import UserError
from research.scaling.table import REQUIRED, STATUSES, Run, Table, read_csv

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15}
WORDS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
OF_WHAT = r"(?:params?|parameters?|tokens?|flops?|nats?(?:/token)?)?"
NUMBER = re.compile(rf"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-z]*?)\s*{OF_WHAT}", re.IGNORECASE)
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
SCALE = "k|m|b|bn|g|t|thousands?|millions?|billions?|trillions?"
IN_HEADER = re.compile(rf"[(\[]\s*(?:in\s+)?({SCALE})\s*[)\]]", re.IGNORECASE)
FINISHED = ("", "finished", "completed", "complete", "done", "success", "succeeded", "ok")
UNEVEN = 0.01  # a count that is so far from a whole number is in millions or billions
NAMED = 10  # rows left out that are named with the reason; of the others, the lines
ODD = (0.3, 30.0)  # FLOPs over 6 params tokens: beyond, something is in other units
FEW_PARAMS, FEW_TOKENS = 1000, 0.01  # of a model, and for each parameter
CONDEMNED = 0.25  # of the runs: one run that makes so many seem diverged is itself not to be believed
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
    """A CSV as a table. notes: what was taken how, and which rows are left out of it, a sentence each. derived: which
    of params, tokens and flops has no column and follows from the others."""

    table: Table
    notes: tuple[str, ...]
    derived: str | None = None


def read(path: Path | str, *, columns: Mapping[str, str | None] | None = None, drop_highest: int = 0) -> Imported:
    """Reads a CSV with ``columns`` naming those of params, tokens, flops, loss, name and status; the usual names are
    found by themselves, and a table of this project is read whole.

    drop_highest: so many rows of the highest loss are left out. Rows that cannot be used are kept with the status
    that says why, or named in the notes where they are no runs at all. Raises UserError for a file that cannot be read,
    a column that is absent, and where no row can be used.
    """
    given = {key: name for key, name in (columns or {}).items() if name}
    rows, header = _rows(path)
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns named {twice!r}: give every column a name of its own.")
    own = set(REQUIRED) <= set(header)
    if own and all(key == name for key, name in given.items()):
        table, notes, derived = read_csv(path), [], None
    else:
        found, doubts = _columns(header, given, path)
        if own:
            doubts.append(
                "The table is of this project, but columns were named: what others say (experts, tokenizer, schedule, "
                "parameters outside embeddings) is not read."
            )
        derived = _derived(found)
        table, notes = _table(rows, header, found, path)
        doubts += _odd(table, found)
        notes = [*doubts, *notes]
    table, dropped = without_highest(table, drop_highest)
    table, doubts = clean(table)
    return Imported(table, (*notes, *dropped, *doubts), derived)


def _rows(path: Path | str) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """(each row that is not empty, with the number of its last line; the names of the columns)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)], header
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file ({error}): give the path of a table of runs.") from error


def _columns(header: Sequence[str], given: Mapping[str, str], path: Path | str) -> tuple[dict[str, str], list[str]]:
    """The columns to read, and a sentence for each that was guessed where others might be meant."""
    has = ", ".join(repr(name) for name in header) or "none"
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{path} has semicolons between its cells: write commas there, and points in numbers.")
    for key, name in given.items():
        if name not in header:
            raise UserError(f"{path} has no column {name!r} for {key}; its columns are {has}.")
    found, notes = dict(given), []
    for key, names in GUESSES.items():
        usual = [name for name in header if name.lower() in names and name not in given.values()]
        if key not in found and usual:
            found[key] = usual[0]
            if len(usual) > 1:
                others = ", ".join(repr(name) for name in usual[1:])
                notes.append(f"The {key} is read from {usual[0]!r}, not from {others}: --{key}-column names another.")
    if len({"params", "tokens"} & set(given)) == 1 and "flops" in given:  # two were named: the third follows
        found = {key: name for key, name in found.items() if key in given or key not in ("params", "tokens")}
    for key in ("params", "tokens", "flops"):
        if key in found and (unit := IN_HEADER.search(found[key])):
            raise UserError(
                f"The column {found[key]!r} of {path} is in units of {unit[1]}: write its numbers out, or with their "
                "unit in each cell, as 125M."
            )
    if "loss" not in found:
        raise UserError(f"{path} needs a column of losses: name it with --loss-column; its columns are {has}.")
    if len({"params", "tokens", "flops"} & set(found)) < 2:
        absent = [key for key in ("params", "tokens", "flops") if key not in found]
        options = " or ".join(f"--{key}-column" for key in absent)
        raise UserError(f"{path} needs two of params, tokens and FLOPs: name a column with {options}; it has {has}.")
    return found, notes


def number(text: str) -> float:
    """A number, with or without thousands' commas and a unit: 70B, 1.4 trillion tokens, 5.76e23 FLOPs. NaN for "nan"
    and for no text. Raises ValueError for other text."""
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.strip()).replace("_", "")
    if text.lower() in ("", "nan", "na", "n/a", "none", "null", "-"):
        return math.nan
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return float(text)
    match = NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in UNITS | WORDS:
        raise ValueError(text)
    return float(match[1]) * (UNITS | WORDS)[unit]


def _table(
    rows: Sequence[tuple[int, list[str]]], header: Sequence[str], columns: Mapping[str, str], path: Path | str
) -> tuple[Table, list[str]]:
    runs, notes, units, names = [], [], 0, set()
    strange: list[str] = []
    renamed: list[int] = []
    for line, cells in rows:
        row = dict(zip(header, cells, strict=False))
        values, with_unit, problem = _values(row, columns)
        if any(cell.strip() for cell in cells[len(header) :]):
            problem = f"{len(cells)} cells for {len(header)} columns: put numbers with commas between quotes"
        problem = problem or _follow(values, columns)
        if problem is not None:
            strange.append(f"line {line}: {problem}")
            continue
        units += with_unit
        name = (row.get(columns.get("name", "")) or "").strip() or f"line-{line}"
        if name in names:
            renamed.append(line)
            name = f"{name} (line {line})"
        names.add(name)
        word = (row.get(columns.get("status", "")) or "").strip()
        status = "finished" if word.lower() in FINISHED else word.lower()
        if status not in STATUSES:
            notes.append(f"The status of {name} is {word!r}, which is taken for failed.")
            status = "failed"
        runs.append(
            Run(
                name=name, params=round(values["params"]), non_embedding_params=round(values["params"]),
                tokens=round(values["tokens"]), flops=values["flops"], loss=values["loss"], status=status,
            )
        )  # fmt: skip
    if not runs:
        reasons = f": {strange[0]}" if strange else ": it has no rows"
        raise UserError(f"No row of {path} can be used{reasons}.")
    derived = _derived(columns)
    if derived is not None:
        notes.append(f"There is no column of {derived}: they follow from FLOPs = 6 params tokens.")
    if renamed:
        notes.append(f"Rows with a name that another has are told apart by their lines: there are {len(renamed)}.")
    if units:
        notes.append(f"Cells with units were read with them, 70B as 7e10: there are {units}.")
    notes += [f"Left out: {problem}." for problem in strange[:NAMED]]
    if len(strange) > NAMED:
        lines = ", ".join(problem.partition(":")[0].removeprefix("line ") for problem in strange[NAMED:])
        notes.append(f"Left out: {len(strange) - NAMED} more without usable numbers, on lines {lines}.")
    return Table(tuple(runs)), notes


def _odd(table: Table, columns: Mapping[str, str]) -> list[str]:
    """What says that a column may be in other units than single params, tokens and FLOPs."""
    found = []
    if {"params", "tokens", "flops"} <= set(columns):
        ratio = float(np.median([run.flops / (6 * run.params * run.tokens) for run in table]))
        if not ODD[0] <= ratio <= ODD[1]:
            found.append(
                f"The FLOPs are {ratio:.3g} times 6 params tokens, and should be about as many: one of the three "
                "columns may be in other units."
            )
    smallest, ratio = min(run.params for run in table), min(run.tokens / run.params for run in table)
    if smallest < FEW_PARAMS or ratio < FEW_TOKENS:
        found.append(
            f"There are models of {smallest:,} parameters and runs of {ratio:.2g} tokens for each: if the numbers "
            "are in millions or billions, write them out or with their unit."
        )
    return found


def _values(row: Mapping[str, str], columns: Mapping[str, str]) -> tuple[dict[str, float], int, str | None]:
    """(the numbers of a row, NaN for those without a column; how many have a unit; what is wrong with one of them)."""
    values, units, problem = {}, 0, None
    for key in ("params", "tokens", "flops", "loss"):
        text = (row.get(columns[key]) or "") if key in columns else ""
        try:
            if key == "loss" and "," in text:
                raise ValueError(text)  # no loss is in the thousands: a decimal comma
            values[key] = number(text)
        except ValueError:
            values[key], problem = math.nan, problem or f"the {key} is {text!r}, which is not a number"
        units += math.isfinite(values[key]) and bool(re.search("[a-z]", re.sub(r"e[-+]?\d+", "", text.lower())))
    return values, units, problem


def _derived(columns: Mapping[str, str]) -> str | None:
    return next((key for key in ("flops", "tokens", "params") if key not in columns), None)


def _follow(values: dict[str, float], columns: Mapping[str, str]) -> str | None:
    """Fills in the one of params, tokens and flops that has no column; what is wrong with the others, if anything."""
    for key in ("params", "tokens", "flops"):
        if key in columns and not (math.isfinite(values[key]) and values[key] > 0):
            return f"the {key} is {values[key]}, and a positive number is needed"
    if "flops" not in columns:
        values["flops"] = 6 * values["params"] * values["tokens"]
    elif "tokens" not in columns:
        values["tokens"] = values["flops"] / (6 * values["params"])
    elif "params" not in columns:
        values["params"] = values["flops"] / (6 * values["tokens"])
    for key in ("params", "tokens"):
        value = values[key]
        if not (math.isfinite(value) and abs(round(value) - value) <= UNEVEN * value):
            return f"the {key} is {value:.4g}, which is no count: write it out, or with its unit, as 125M"
    return None


def without_highest(table: Table, count: int) -> tuple[Table, list[str]]:
    """The table without the usable runs of the highest loss, and which those are. Raises UserError where none would be
    left."""
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
    told = f"Left out for the highest losses ({lowest:.4g} and above): {', '.join(sorted(names))}."
    return Table(tuple(run for run in table if run.name not in names)), [told]


def _without_too_good(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs, the best of a few marked as failed where it alone makes many larger and longer ones seem diverged."""
    notes = []
    while True:
        good = [run for run in runs if run.problem is None]
        best = min(good, key=lambda run: run.loss, default=None)
        if best is None or len(good) < 1 / CONDEMNED:
            return runs, notes
        kind = [run for run in good if run.experts == best.experts]
        above = [run for run in kind if run.params >= best.params and run.tokens >= best.tokens]
        worse = sum(run.loss > best.loss * (1 + WORSE) for run in above)
        if worse <= CONDEMNED * len(good):
            return runs, notes
        runs = [replace(run, status="failed") if run is best else run for run in runs]
        notes.append(
            f"{best.name} is left out: its loss {best.loss:.4g} is more than {WORSE:.0%} below those of {worse} runs "
            "that are no smaller and no shorter; its loss may be of other units or other text."
        )


def clean(table: Table) -> tuple[Table, tuple[str, ...]]:
    """The table without copies of a run, and with the status "diverged" for those that are far worse than a smaller
    model on fewer tokens; and what was done, a sentence each. Repeats that differ in loss (other seeds) stay."""
    runs, notes, seen = [], [], {}
    for run in table:
        key = (run.params, run.tokens, run.flops, run.loss)
        if run.problem is None and key in seen:
            notes.append(f"{run.name} is left out: a copy of {seen[key]}, with the same size, tokens and loss.")
            continue
        if run.problem is None:
            seen[key] = run.name
        runs.append(run)
    runs, doubtful = _without_too_good(runs)
    notes += doubtful
    good = [run for run in runs if run.problem is None]
    params, tokens, losses = (np.array([getattr(run, n) for run in good], float) for n in ("params", "tokens", "loss"))
    experts = np.array([run.experts or 0 for run in good])
    for index, run in enumerate(runs):
        if run.problem is not None:
            continue
        less = (params <= run.params) & (tokens <= run.tokens) & (experts == (run.experts or 0))  # itself among them
        better = good[int(np.argmin(np.where(less, losses, np.inf)))]
        if run.loss > better.loss * (1 + WORSE):
            runs[index] = replace(run, status="diverged")
            notes.append(
                f"{run.name} is taken to have diverged: its loss {run.loss:.4g} is "
                f"{run.loss / better.loss - 1:.0%} above "
                f"that of {better.name}, which is no larger and saw no more tokens."
            )
    stay = [run for run in runs if run.problem is None]
    seeds = len(stay) - len({(run.params, run.tokens) for run in stay})
    if seeds:
        notes.append(f"Runs that repeat another's size and tokens with another loss all count (seeds): {seeds}.")
    return Table(tuple(runs)), tuple(notes)
