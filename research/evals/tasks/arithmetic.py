# SPDX-License-Identifier: Apache-2.0
"""Sums with worked steps: ``17+5-8=`` is answered ``17+5=22;22-8=14#14``."""

from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import Draws, Problem, Procedural, Reward
from research.rl.rewards.numeric import Numeric

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass(frozen=True)
class Arithmetic(Procedural):
    """Left to right over ``terms`` numbers of at most ``digits`` digits (from 0).

    operations: what stands between them; results may be below zero.
    """

    terms: int = 3
    digits: int = 2
    operations: str = "+-"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms < 2 or self.digits < 1 or not set(self.operations) <= set(OPERATIONS) or not self.operations:
            raise UserError(
                f"Arithmetic needs terms of at least 2, digits of at least 1 and operations among "
                f"{''.join(OPERATIONS)}; given {self.terms}, {self.digits} and {self.operations!r}."
            )

    @property
    def verifier(self) -> Reward:
        return Numeric(self.mark)

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        text = str(total := draws.integer(0, 10**self.digits - 1))
        steps = []
        for _ in range(self.terms - 1):
            sign, number = draws.one_of(self.operations), draws.integer(0, 10**self.digits - 1)
            text += f"{sign}{number}"
            before, total = total, OPERATIONS[sign](total, number)
            steps.append(f"{before}{sign}{number}={total}")
        worked = ";".join(steps) + self.mark.write(str(total))
        return text, Problem(f"{text}=", str(total), worked)
