# SPDX-License-Identifier: Apache-2.0
"""Remainders with worked steps: ``((17+5)*8) mod 7=`` is answered ``17+5=22=1;1*8=8=1#1``."""

from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.arithmetic import OPERATIONS
from research.evals.tasks.base import Draws, Problem, Procedural, Reward
from research.rl.rewards.numeric import Numeric


@dataclass(frozen=True)
class Modular(Procedural):
    """The remainder of ``terms`` numbers of at most ``digits`` digits (from 0), put together as their brackets say.

    operations: what stands between them. moduli: the least and the greatest number that is divided by; the answer is
    from 0 to one below it.
    """

    terms: int = 3
    digits: int = 2
    operations: str = "+-*"
    moduli: tuple[int, int] = (2, 20)

    def __post_init__(self) -> None:
        super().__post_init__()
        fit = (
            set(self.operations) <= set(OPERATIONS) and len(self.moduli) == 2 and 2 <= self.moduli[0] <= self.moduli[1]
        )
        if self.terms < 1 or self.digits < 1 or not self.operations or not fit:
            raise UserError(
                f"Modular needs terms and digits of at least 1, operations among {''.join(OPERATIONS)} and moduli in "
                f"order from 2; given {self.terms}, {self.digits}, {self.operations!r} and {self.moduli}."
            )

    @property
    def verifier(self) -> Reward:
        return Numeric(self.mark)

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        modulus = draws.integer(*self.moduli)
        number = draws.integer(0, 10**self.digits - 1)
        text, rest, steps = str(number), number, []
        for _ in range(self.terms - 1):
            sign, number = draws.one_of(self.operations), draws.integer(0, 10**self.digits - 1)
            text = f"({text}{sign}{number})"
            before, full = rest, OPERATIONS[sign](rest, number)
            rest = full % modulus
            steps.append(f"{before}{sign}{number}={full}" + f"={rest}" * (rest != full))
        if not steps:
            rest = number % modulus
            steps.append(f"{number}" + f"={rest}" * (rest != number))
        prompt = f"{text} mod {modulus}="
        return prompt, Problem(prompt, str(rest), ";".join(steps) + self.mark.write(str(rest)))
