# SPDX-License-Identifier: Apache-2.0
"""All tasks of reasoning-gym (Stojanovski et al. 2025; the extra ``rl``), made and scored in worker processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from research.core.types import UserError
from research.evals.tasks.base import TAGS, Draws, Marked, Problem, Procedural, Response, Reward
from research.rl.workers import Result, Workers, installed, shared

LONGEST = 20_000  # characters of an answer that are looked at


@dataclass(frozen=True)
class GymScore:
    """The library's own score of the marked answer, 1 where it is right; some give a part for what is nearly so.

    What it cannot score in time is 0. The fields are those of ``Gym``.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mark: Marked | None = TAGS
    seconds: float = 20.0
    memory: int = 2 << 30
    processes: int = 0

    def score(self, problem: Problem, response: Response) -> float:
        found = response.text if self.mark is None else self.mark.find(response.text)
        if not found or len(found) > LONGEST:
            return 0.0
        seed, question = problem.data["seed"], problem.data["question"]
        result = _workers(self).call(f"{LIBRARY}:score", self.name, self.settings, seed, question, found)
        if result == Result(None):
            raise UserError(
                f"reasoning-gym's {self.name} asks another question of a seed than when this problem was made: use the "
                "version in constraints.txt, and make the problems anew."
            )
        return 0.0 if result.failure else float(result.value)


@dataclass(frozen=True)
class Gym(Procedural):
    """The task ``name`` of reasoning-gym with ``settings`` of its own, such as ``Gym("chain_sum", {"max_terms": 3})``.

    Each problem is that of a seed of its own. The library's own seeds may not part the splits, as it gives the same
    question to many: a hash of the question does, as in ``drawn``. instruction: what stands behind each question.
    mark: how responses mark their answer; None, and all of it is the answer. held_out: the share of all questions that
    are for validation. seconds: CPU time to make a problem or to score one; memory: bytes of a process; processes: how
    many at most, 0 for one a core. Raises UserError for a name or settings that the library does not know.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mark: Marked | None = field(default=TAGS, kw_only=True)
    instruction: str = ""
    seconds: float = 20.0
    memory: int = 2 << 30
    processes: int = 0

    @property
    def verifier(self) -> Reward:
        return GymScore(self.name, self.settings, self.mark, self.seconds, self.memory, self.processes)

    @property
    def kind(self) -> tuple[str, ...]:
        return "gym", self.name

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        seed = draws.integer(0, 2**31 - 1)
        made = _workers(self).call(f"{LIBRARY}:problem", self.name, self.settings, seed)
        if made.failure:
            raise UserError(
                f"reasoning-gym made no problem of {self.name!r} with the settings {dict(self.settings)} "
                f"({made.detail or made.failure}): choose one of its tasks, and settings that its config has."
            )
        question = made.value["question"]
        data = {"seed": seed, "question": question}
        return question, Problem(question + self.instruction, made.value["answer"], data=data)


LIBRARY = "research.rl.verifiers.gym"


def names(processes: int = 0) -> list[str]:
    """All tasks that there are."""
    return _workers(Gym("", processes=processes)).call(f"{LIBRARY}:names").value


def _workers(setting: Gym | GymScore) -> Workers:
    installed("reasoning_gym", "reasoning-gym")
    return shared(setting.processes, setting.seconds, setting.memory)
