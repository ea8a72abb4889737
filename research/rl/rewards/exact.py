# SPDX-License-Identifier: Apache-2.0
"""Whether the marked answer is the reference, letter for letter."""

from dataclasses import dataclass

from research.evals.tasks.base import Marked, Problem, Response

SPARE = 1000  # characters of space that an answer may have besides


@dataclass(frozen=True)
class Exact:
    """1 where the marked answer and the reference are one text.

    mark: None, and the whole response is the answer. any_space: runs of space count as one space, and those at the ends
    as none. any_case: upper and lower case are one.
    """

    mark: Marked | None = Marked()
    any_space: bool = True
    any_case: bool = False

    def score(self, problem: Problem, response: Response) -> float:
        found = response.text if self.mark is None else self.mark.find(response.text)
        if found is None or len(found) > 2 * len(problem.reference) + SPARE:
            return 0.0
        return float(self._plain(found) == self._plain(problem.reference))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.any_space else text
        return text.casefold() if self.any_case else text
