# SPDX-License-Identifier: Apache-2.0
"""What a response's length is worth, in tokens."""

import math
from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import Problem, Response, Reward


@dataclass(frozen=True)
class SoftOverlong:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), to be added to a verifier's reward:
    0 up to ``max_tokens - cache`` tokens, from there down a line to -1 at ``max_tokens``, and -1 beyond."""

    max_tokens: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.max_tokens:
            raise UserError(
                f"SoftOverlong needs a cache from 1 to max_tokens; given cache={self.cache} and "
                f"max_tokens={self.max_tokens}."
            )

    def score(self, problem: Problem, response: Response) -> float:
        over = response.tokens - (self.max_tokens - self.cache)
        return -min(max(over / self.cache, 0.0), 1.0)


@dataclass(frozen=True)
class Cosine:
    """The cosine reward of Yeo et al. 2025 (arXiv 2502.03373; as in the authors' code, without its penalty of
    repetition): a right answer is worth more the shorter it is, a wrong one costs less the longer it is; from 0 to
    ``max_tokens`` tokens each goes along half a cosine.

    verifier: right where it gives at least 1. right, wrong: what is given at 0 tokens and at ``max_tokens``. too_long:
    what is given from ``max_tokens`` on, or where the response was cut off.
    """

    verifier: Reward
    max_tokens: int
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    too_long: float = -1.0

    def __post_init__(self) -> None:
        numbers = (*self.right, *self.wrong, self.too_long)
        if self.max_tokens < 1 or len(numbers) != 5 or not all(map(math.isfinite, numbers)):
            raise UserError(
                "Cosine needs max_tokens of at least 1 and finite rewards, two each for right and wrong; given "
                f"max_tokens={self.max_tokens}, right={self.right}, wrong={self.wrong} and too_long={self.too_long}."
            )

    def score(self, problem: Problem, response: Response) -> float:
        if response.tokens >= self.max_tokens or not response.finished:
            return self.too_long
        first, last = self.right if self.verifier.score(problem, response) >= 1 else self.wrong
        return last + (first - last) * (1 + math.cos(math.pi * response.tokens / self.max_tokens)) / 2
