# SPDX-License-Identifier: Apache-2.0
"""Whether the marked answer equals the reference by mathematics: (x+1)^2 and x^2+2x+1 are one."""

from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import BOXED, Marked, Problem, Response
from research.rl.workers import installed, shared

LONGEST = 2000  # characters of a marked answer that are looked at
TAIL = 10_000  # of a whole response, at its end


@dataclass(frozen=True)
class Symbolic:
    """1 where Hugging Face's math-verify (the extra ``rl``) finds the answer equal to the reference, both plain or in
    LaTeX, floats to six places. It parses and simplifies in worker processes; what it cannot finish is 0.

    mark: None, and math-verify looks for the answer in the last 10,000 characters. seconds: CPU time of a comparison.
    memory: bytes of a process. processes: how many at most; 0 for one a core.
    """

    mark: Marked | None = BOXED
    seconds: float = 5.0
    memory: int = 2 << 30
    processes: int = 0

    def score(self, problem: Problem, response: Response) -> float:
        found = response.text[-TAIL:] if self.mark is None else self.mark.find(response.text)
        if not found or self.mark is not None and len(found) > LONGEST:
            return 0.0
        installed("math_verify", "math-verify")
        workers = shared(self.processes, self.seconds, self.memory)
        name = "research.rl.verifiers.symbolic:equal"
        result = workers.call(name, problem.reference, found, self.mark is None)
        if result.failure == "size":
            raise UserError("A reference is over a megabyte long: no answer can be compared with it.")
        return float(result.value is True)
