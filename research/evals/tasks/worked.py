# SPDX-License-Identifier: Apache-2.0
"""A task's problems with their worked solutions, as conversations to learn from before trial and error."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from research.core.types import UserError
from research.data.cache import name_of
from research.data.chat import Conversation, Message
from research.data.sources.base import SPLITS, check_split
from research.data.sources.conversations import texts
from research.evals.tasks.base import Task

FORMAT = 1


@dataclass(frozen=True)
class Worked:
    """The first ``count`` problems of a task's train split and ``validation_count`` of its validation split, or all
    where it has fewer: what is asked is the user's turn, the worked solution the assistant's.

    system: what a system turn before each says; "" for none.
    """

    task: Task
    count: int
    validation_count: int = 256
    system: str = ""

    def __post_init__(self) -> None:
        if self.count < 1 or self.validation_count < 1:
            raise UserError(
                f"Worked takes at least one problem of each split; given count={self.count} and "
                f"validation_count={self.validation_count}."
            )

    def fingerprint(self, cache_dir: Path) -> str:
        return name_of("worked", FORMAT, _content_hash(self))

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        check_split(split)
        wanted = self.count if split == "train" else self.validation_count
        first = (Message("system", self.system),) if self.system else ()
        size = self.task.size(split)
        for index in range(wanted if size is None else min(wanted, size)):
            problem = self.task.problem(split, index)
            if not problem.worked:
                raise UserError(
                    f"Problem {index} of {type(self.task).__name__}'s {split} split has no worked solution, so that "
                    "there is nothing to learn from: choose a task that has them."
                )
            yield (*first, Message("user", problem.prompt), Message("assistant", problem.worked))

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        return texts(self.conversations(split, cache_dir=cache_dir))


@functools.lru_cache(maxsize=16)
def _content_hash(corpus: Worked) -> str:
    """A hash of all that the corpus says: problems are made, not kept, and what makes them may change."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for conversation in corpus.conversations(split, cache_dir=Path()):
            digest.update(json.dumps([split, *conversation]).encode() + b"\n")
    return digest.hexdigest()
