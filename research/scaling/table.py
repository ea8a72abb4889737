# SPDX-License-Identifier: Apache-2.0
"""The table of runs: one frozen row for each run of a study, read from and written to CSV.

This is what the launchers hand to a study's ``analyze`` and what every fit in this room reads.
"""

import csv
import dataclasses
import io
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from research.core.files import write_atomically
from research.core.types import UserError

Status = Literal["finished", "running", "interrupted", "changed", "failed", "diverged", "missing"]
STATUSES: tuple[str, ...] = typing.get_args(Status)
ParameterCount = Literal["total", "non_embedding", "with_head"]


@dataclass(frozen=True)
class Run:
    """One run. None stands for what was not measured (an empty cell).

    params: all parameters, embedding tables and head included. non_embedding_params: without both.
    tokens: training tokens. flops: training FLOPs (``research.scaling.cost``). loss: validation loss at the
    end of the run, nats per token. bits_per_byte: the same in bits per byte of text. seconds: wall-clock
    time. corpus_bytes, corpus_hash: size and content hash of the training text. experts: the most that a layer
    has, 0 for a dense model. active_params: the parameters that one token goes through, None for all of them.
    head_params: those of the output head, whether tied or not. learning_rate: the schedule's peak. batch_tokens: tokens
    of a step. warmup_tokens: seen while the learning rate rises. unique_tokens: of the training text, from where on
    tokens repeat. schedule, tokenizer: in words, for reports.
    """

    name: str
    params: int
    non_embedding_params: int
    tokens: int
    flops: float
    loss: float | None = None
    bits_per_byte: float | None = None
    status: Status = "missing"
    seconds: float | None = None
    corpus_bytes: int | None = None
    corpus_hash: str | None = None
    experts: int | None = None
    active_params: int | None = None
    head_params: int | None = None
    learning_rate: float | None = None
    batch_tokens: int | None = None
    warmup_tokens: int | None = None
    unique_tokens: int | None = None
    schedule: str | None = None
    tokenizer: str | None = None

    @property
    def active(self) -> int:
        """Parameters that one token goes through."""
        return self.params if self.active_params is None else self.active_params

    def count(self, parameters: ParameterCount) -> int:
        """The parameter count of a convention: all; without embedding tables and head; without embedding tables alone
        (what is multiplied). Raises UserError for a convention that does not exist, or a head that is not known."""
        if parameters not in typing.get_args(ParameterCount):
            choices = ", ".join(repr(name) for name in typing.get_args(ParameterCount))
            raise UserError(f"parameters is {parameters!r}: choose one of {choices}.")
        if parameters == "total":
            return self.params
        if parameters == "non_embedding":
            return self.non_embedding_params
        if self.head_params is None:
            raise UserError(
                f"The table does not say how many parameters the head of {self.name} has: count them otherwise."
            )
        return self.non_embedding_params + self.head_params

    @property
    def problem(self) -> str | None:
        """Why the run cannot stand in a fit, in a few words; None where it can."""
        if self.status != "finished":
            return {"running": "still running", "missing": "never ran", "changed": "run under other settings"}.get(
                self.status, self.status
            )
        if self.loss is None:
            return "finished without a validation loss"
        if not (math.isfinite(self.loss) and self.loss > 0):
            return f"its loss is {self.loss}"
        for name in ("params", "tokens", "flops"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                return f"its {name} is {value}"
        return None


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
REQUIRED = COLUMNS[: COLUMNS.index("corpus_bytes")]


@dataclass(frozen=True)
class Table:
    """The runs of a study, in order, each name once."""

    runs: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
        seen: set[str] = set()
        for run in self.runs:
            if run.name in seen:
                raise UserError(f"Two runs of the table are named {run.name!r}: give every run a name of its own.")
            seen.add(run.name)

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __getitem__(self, name: str) -> Run:
        for run in self.runs:
            if run.name == name:
                return run
        raise UserError(f"The table has no run {name!r}; it has: {', '.join(r.name for r in self.runs)}.")

    def finished(self) -> "Table":
        """The runs that can stand in a fit: finished, with a finite positive loss."""
        return Table(tuple(run for run in self.runs if run.problem is None))

    def excluded(self) -> dict[str, str]:
        """The other runs by name, each with the reason."""
        return {run.name: run.problem for run in self.runs if run.problem is not None}


def write_csv(table: Table, path: Path | str) -> None:
    """Writes the table, columns in the order of ``COLUMNS``; numbers read back exactly. Atomic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in table:
        writer.writerow("" if v is None else repr(v) if isinstance(v, float) else v for v in _values(run))
    write_atomically(path, text.getvalue())


def _values(run: Run) -> list[Any]:
    hints = typing.get_type_hints(Run)
    values = []
    for column in COLUMNS:
        value = getattr(run, column)
        if value is not None and float in (hints[column], *typing.get_args(hints[column])):
            value = float(value)  # also takes in numpy scalars, whose repr is not a number
        values.append(value)
    return values


def read_csv(path: Path | str) -> Table:
    """Reads a table. The columns from corpus_bytes on may be left out, and those of other names are passed over.

    Raises UserError for a file that is absent or empty, a missing column, a cell that is not a number, an
    unknown status or a name that comes twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The table {path} cannot be read ({error}): give the path of a table of runs.") from error
    absent = [name for name in REQUIRED if name not in header]
    if absent:
        raise UserError(f"The table {path} has no column {absent[0]!r}: it needs {', '.join(REQUIRED)}.")
    return Table(tuple(_run(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)))


def _run(row: dict[str, str | None], where: str) -> Run:
    hints, values = typing.get_type_hints(Run), {}
    for column in COLUMNS:
        text = (row.get(column) or "").strip()
        kinds = typing.get_args(hints[column]) or (hints[column],)
        if column == "status":
            if text not in STATUSES:
                raise UserError(f"{where}: the status is {text!r}; it must be one of {', '.join(STATUSES)}.")
            values[column] = text
        elif not text:
            if type(None) not in kinds:
                raise UserError(f"{where}: the {column} is empty; every run needs one.")
            values[column] = None
        elif kinds[0] is str:
            values[column] = text
        else:
            values[column] = _number(text, kinds[0], column, where)
    return Run(**values)


def _number(text: str, kind: type, column: str, where: str) -> int | float:
    try:
        if kind is float:
            return float(text)
        return int(text) if text.lstrip("+-").isdigit() else int(round(float(text)))
    except (ValueError, OverflowError):
        raise UserError(f"{where}: the {column} is {text!r}, which is not a number.") from None
