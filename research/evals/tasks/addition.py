# SPDX-License-Identifier: Apache-2.0
"""Long addition, column by column: ``58+67=`` is answered ``8+7=15,5+6+1=12#125``."""

from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import Draws, Problem, Procedural, Reward
from research.rl.rewards.numeric import Numeric


@dataclass(frozen=True)
class Addition(Procedural):
    """Two numbers of exactly ``digits`` digits, the first not 0. The worked solution adds the digits of each column,
    from the right, with what is carried."""

    digits: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits < 2:
            raise UserError(f"Addition needs numbers of at least 2 digits; given {self.digits}.")

    @property
    def verifier(self) -> Reward:
        return Numeric(self.mark)

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        least = 10 ** (self.digits - 1)
        first, second = (draws.integer(least, 10 * least - 1) for _ in range(2))
        steps, carry = [], 0
        for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True):
            total = int(a) + int(b) + carry
            steps.append(f"{a}+{b}{'+1' if carry else ''}={total}")
            carry = total // 10
        text, answer = f"{first}+{second}", str(first + second)
        return text, Problem(f"{text}=", answer, ",".join(steps) + self.mark.write(answer))
