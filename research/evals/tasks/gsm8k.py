# SPDX-License-Identifier: Apache-2.0
"""GSM8K (Cobbe et al. 2021): 7,473 and 1,319 word problems of grade school, from the files as they are shipped."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from research.core.types import UserError
from research.data.sources.base import check_split
from research.evals.tasks.base import Marked, Problem, Reward
from research.rl.rewards.numeric import Numeric

NOTE = re.compile(r"<<[^<>\n]*>>")  # what a calculator was asked: <<48/2=24>>


class Row(NamedTuple):
    question: str
    steps: str
    answer: str


@dataclass(frozen=True)
class GSM8K:
    """The problems of two JSONL files: ``train`` and, as validation, ``test``; a question of both is in that alone.

    notes: whether worked solutions keep the calculator's notes. mark: how responses mark their answer. instruction:
    what stands behind each question. Raises UserError for files that are not GSM8K's, and past a split's end.
    """

    train: str
    test: str
    notes: bool = False
    mark: Marked = Marked()
    instruction: str = ""

    def size(self, split: str) -> int:
        return len(self._rows(split))

    @property
    def verifier(self) -> Reward:
        return Numeric(self.mark)

    def problem(self, split: str, index: int) -> Problem:
        rows = self._rows(split)
        if not 0 <= index < len(rows):
            raise UserError(f"GSM8K's split {split} has {len(rows)} problems, from 0: there is no problem {index}.")
        row = rows[index]
        steps = row.steps if self.notes else NOTE.sub("", row.steps)
        answer = f"#### {row.answer}" if self.mark == Marked() else self.mark.write(row.answer)
        return Problem(row.question + self.instruction, row.answer, f"{steps}\n{answer}")

    def _rows(self, split: str) -> tuple[Row, ...]:
        check_split(split)
        return _split(self.train, self.test)[split]


@functools.lru_cache(maxsize=4)
def _split(train: str, test: str) -> dict[str, tuple[Row, ...]]:
    held_out = _read(test)
    asked = {row.question for row in held_out}
    kept = tuple(row for row in _read(train) if row.question not in asked)
    if not kept:
        raise UserError(f"All questions of {train} are in {test} too: give GSM8K's train file and its test file.")
    return {"train": kept, "validation": held_out}


def _read(path: str) -> tuple[Row, ...]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"GSM8K's file {path} cannot be read ({error}): check the path.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                steps, answer = record["answer"].rsplit("\n#### ", 1)
                rows.append(Row(record["question"], steps, answer.strip()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"Line {number} of {path} is not a problem of GSM8K: it needs a question, and an answer whose last "
                    "line is #### and a number."
                ) from error
    if not rows:
        raise UserError(f"GSM8K's file {path} has no problems.")
    return tuple(rows)
