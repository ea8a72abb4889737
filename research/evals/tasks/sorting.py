# SPDX-License-Identifier: Apache-2.0
"""Numbers to be put in order, by insertion: ``5 3 9:`` is answered ``5;3 5;3 5 9#3 5 9``."""

import bisect
from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import Draws, Problem, Procedural, Reward
from research.rl.rewards.exact import Exact


@dataclass(frozen=True)
class Sorting(Procedural):
    """From ``shortest`` to ``longest`` numbers of at most ``digits`` digits (from 0), the least first."""

    shortest: int = 3
    longest: int = 6
    digits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.shortest <= self.longest or self.digits < 1:
            raise UserError(
                f"Sorting needs 1 <= shortest <= longest and digits of at least 1; given {self.shortest}, "
                f"{self.longest} and {self.digits}."
            )

    @property
    def verifier(self) -> Reward:
        return Exact(self.mark)

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        count = draws.integer(self.shortest, self.longest)
        numbers = [draws.integer(0, 10**self.digits - 1) for _ in range(count)]
        done: list[int] = []
        steps = []
        for number in numbers:
            bisect.insort(done, number)
            steps.append(_listed(done))
        text = f"{_listed(numbers)}:"
        return text, Problem(text, _listed(done), ";".join(steps) + self.mark.write(_listed(done)))


def _listed(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))
