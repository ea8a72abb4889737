# SPDX-License-Identifier: Apache-2.0
"""Metrics on disk: ``metrics.jsonl`` is the truth, TensorBoard files are written from it.

A run that goes on from step s drops every line past s first, so that the file reads as if the run had never
stopped; TensorBoard's files are then made anew from the lines that stay.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from research.core.types import UserError

# Fields that depend on the clock: everything else repeats bit for bit when a run is resumed.
CLOCK_FIELDS = ("seconds", "step_seconds", "tokens_per_second", "peak_share")
CLOCK_FIELDS += tuple(f"seconds/{part}" for part in ("generation", "reward", "training"))
FILE = "metrics.jsonl"


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run, oldest first. A last line cut short by a crash is left out.

    Raises UserError for any other line that is not a JSON object with a step.
    """
    path = directory / FILE
    if not path.exists():
        return []
    lines = []
    *whole, _ = path.read_bytes().split(b"\n")  # what follows the last newline was cut short
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"Line {number} of {path} is damaged: mend or remove that line; the other {len(whole) - 1} are kept."
            ) from error
        lines.append(line)
    return lines


class MetricsWriter:
    """Appends one JSON object a line; arrays become lists, numbers that are not finite become text."""

    def __init__(self, directory: Path, *, step: int) -> None:
        """Opens a run's files to go on after ``step``: later lines, and TensorBoard's record of them, go."""
        self.directory = directory
        kept = [line for line in read(directory) if line["step"] <= step]
        self.seconds = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)
        temporary = directory / (FILE + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, directory / FILE)
        self._file = (directory / FILE).open("a")
        self._board: Any = None
        self._pending = kept
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, **{name: plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._pending.append(line)
        self._to_board()

    def _to_board(self) -> None:
        # Imported here, so that the first step does not wait for it. Written in this thread: the library's own writer
        # has a thread that dies of a full disk without a word, and the run then waits for it for ever.
        from tensorboardX.record_writer import RecordWriter

        event, summary = (import_module(f"tensorboardX.proto.{name}_pb2") for name in ("event", "summary"))
        if self._board is None:
            folder = self.directory / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            self._board = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"))
            self._board.write(event.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for line in self._pending:
            values = [summary.Summary.Value(tag=name, simple_value=value) for name, value in scalars(line)]
            one = event.Event(wall_time=time.time(), step=line["step"], summary=summary.Summary(value=values))
            self._board.write(one.SerializeToString())
        self._pending = []

    def close(self) -> None:
        self._file.close()
        if self._pending:  # a run that had nothing left to do
            self._to_board()
        if self._board is not None:
            self._board.close()


class Unwritten:
    """In place of a ``MetricsWriter`` where another host writes."""

    seconds = 0.0

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def plain(value: Any) -> Any:
    """A JSON value for a number or an array."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def scalars(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Name and value of every number in a line; a list gives one name per layer."""
    for name, value in line.items():
        if name == "step":
            continue
        for suffix, number in enumerate(value) if isinstance(value, list) else [("", value)]:
            if isinstance(number, int | float):
                yield (f"{name}/{suffix}" if suffix != "" else name), float(number)
