# SPDX-License-Identifier: Apache-2.0
"""What a task is: an endless, or long, row of problems in two splits that share none, and what tells right from wrong.

To add one, write one file in this folder: a frozen dataclass (``Task``).
"""

import abc
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.core.types import UserError
from research.data.sources.base import check_split, unit_hash


class Problem(NamedTuple):
    """prompt: what is asked, as a user's turn. reference: the right answer, or one of them. worked: a whole right
    response with its steps, "" where none is known. data: what the verifier needs besides, as JSON."""

    prompt: str
    reference: str
    worked: str = ""
    data: Mapping[str, Any] = {}


class Response(NamedTuple):
    """What was said: its text, how many tokens it took, and whether it came to its own end (else it was cut off)."""

    text: str
    tokens: int = 0
    finished: bool = True


BRACKETS = {"{": "}", "[": "]", "(": ")"}
LONGEST = 10_000  # characters within which a bracket must be closed


@runtime_checkable
class Reward(Protocol):
    """A frozen dataclass that says how good a response is: 1 is right, 0 is not. It may be asked from several threads
    at once, whatever the text is: it takes bounded time, and never evaluates any."""

    def score(self, problem: Problem, response: Response) -> float: ...


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass. ``problem`` is a pure function; no problem of one split is one of the other."""

    def size(self, split: str) -> int | None:
        """How many problems a split has; None where they are endless."""
        ...

    @property
    def verifier(self) -> Reward:
        """What tells a right response from a wrong one."""
        ...

    def problem(self, split: str, index: int) -> Problem: ...


@dataclass(frozen=True)
class Marked:
    """How a response marks its answer: after the last ``before``, up to ``after`` or else the line's end.

    Where ``before`` ends with a bracket and ``after`` closes it, up to the one that closes it, over those in between
    that are not LaTeX's \\{ and \\}.
    """

    before: str = "####"
    after: str = ""

    def __post_init__(self) -> None:
        if not self.before:
            raise UserError("An answer's mark is empty: give what stands before it, such as ####.")

    def find(self, text: str) -> str | None:
        """The answer without the space around it, None where there is no mark."""
        at = text.rfind(self.before)
        if at < 0:
            return None
        rest = text[at + len(self.before) :]
        if BRACKETS.get(self.before[-1]) == self.after:
            end = _closing(rest[:LONGEST], self.before[-1], self.after)
        else:
            end = rest.find(self.after or "\n")
        if end < 0 and self.after:
            return None
        return (rest if end < 0 else rest[:end]).strip()

    def write(self, answer: str) -> str:
        return f"{self.before}{answer}{self.after}"


def _closing(text: str, opening: str, closing: str) -> int:
    """Where the bracket is closed that stood before the text; -1 where it is not."""
    depth = 1
    for found in re.finditer(rf"\\.|[{re.escape(opening + closing)}]", text, re.DOTALL):
        depth += {opening: 1, closing: -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return -1


TAGS = Marked("<answer>", "</answer>")
BOXED = Marked("\\boxed{", "}")


@dataclass
class Draws:
    """Numbers that depend on what it was made of alone: raw words of a counter-based generator, whose definition is
    fixed, while libraries may change how they draw from a range."""

    parts: tuple[Any, ...]
    _words: Any = field(init=False)

    def __post_init__(self) -> None:
        key = hashlib.sha256(repr(self.parts).encode()).digest()[:16]
        self._words = np.random.Philox(key=np.frombuffer(key, np.uint64))

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both among them."""
        return low + int(self._words.random_raw()) % (high - low + 1)

    def one_of(self, choices: Any) -> Any:
        return choices[self.integer(0, len(choices) - 1)]


@dataclass(frozen=True, kw_only=True)
class Procedural(abc.ABC):
    """A task without an end, whose problems are drawn: an index says which, a hash of the problem's text in which split
    it is, so that the splits of all seeds share nothing.

    mark: how responses mark their answer. held_out: the share of all problems that are for validation.
    """

    mark: Marked = Marked("#")
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out must lie between 0 and 1; given {self.held_out}.")

    @property
    @abc.abstractmethod
    def verifier(self) -> Reward: ...

    @abc.abstractmethod
    def draw(self, draws: Draws) -> tuple[str, Problem]:
        """A problem of either split, and the text that tells it from others."""

    @property
    def kind(self) -> tuple[str, ...]:
        """What parts its draws from those of other tasks."""
        return (type(self).__name__.lower(),)

    def size(self, split: str) -> None:
        check_split(split)

    def problem(self, split: str, index: int) -> Problem:
        check_split(split)
        for attempt in range(10_000):
            text, problem = self.draw(Draws((*self.kind, self.seed, split, index, attempt)))
            if (unit_hash(text) < self.held_out) == (split == "validation"):
                return problem
        raise UserError(
            f"No problem of the split {split} was found in 10,000 draws: the task has too few problems, or a held_out "
            f"of {self.held_out} leaves none; give it more numbers or digits."
        )
