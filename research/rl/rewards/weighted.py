# SPDX-License-Identifier: Apache-2.0
"""Rewards made of rewards: a weighted sum of named parts, and one that counts only behind a gate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from research.core.types import UserError
from research.evals.tasks.base import Problem, Response, Reward


@dataclass(frozen=True)
class Weighted:
    """The sum of ``weight * reward`` over its parts, as in ``{"right": (1.0, Numeric()), "form": (0.1, Format())}``."""

    parts: Mapping[str, tuple[float, Reward]] = field(hash=False)

    def __post_init__(self) -> None:
        parts = self.parts.values() if isinstance(self.parts, Mapping) else ()
        if not parts or not all(isinstance(part, tuple) and len(part) == 2 and _is_finite(part[0]) for part in parts):
            raise UserError(
                "Weighted needs parts, each of a name, a finite weight and a reward, as in "
                f'Weighted({{"correct": (1.0, task.verifier)}}); given {self.parts!r}.'
            )

    def components(self, problem: Problem, response: Response) -> dict[str, float]:
        """What each part gives, before its weight."""
        return {name: float(reward.score(problem, response)) for name, (_, reward) in self.parts.items()}

    def total(self, components: Mapping[str, float]) -> float:
        """What they are worth together."""
        return math.fsum(weight * components[name] for name, (weight, _) in self.parts.items())

    def score(self, problem: Problem, response: Response) -> float:
        return self.total(self.components(problem, response))


def _is_finite(weight: object) -> bool:
    return isinstance(weight, int | float) and math.isfinite(weight)


@dataclass(frozen=True)
class Gated:
    """``reward`` where ``gate`` gives at least 1, such as a right form; else ``closed``."""

    gate: Reward
    reward: Reward
    closed: float = 0.0

    def score(self, problem: Problem, response: Response) -> float:
        return self.reward.score(problem, response) if self.gate.score(problem, response) >= 1 else self.closed
