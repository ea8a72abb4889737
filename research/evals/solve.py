# SPDX-License-Identifier: Apache-2.0
"""How many held-out problems a model solves: greedily, by a draw, and by the best of several draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.core.types import Context, EvalRun, Metrics, UserError
from research.evals.tasks.base import Problem, Task
from research.models.bound import Bound
from research.rl.groups import agreed, graded, grouped
from research.rl.respond import Speaker, Speech


@dataclass(frozen=True)
class Solve:
    """A task's verifier over its first ``problems`` validation problems.

    greedy: ``NAME/greedy``, the share solved by the likeliest tokens. samples: draws for each problem at
    ``temperature`` (0: none), of which ``NAME/pass@k`` is the chance that one of k solves it, without bias (Chen et al.
    2021, eq. 1), for k of 1 and of ``samples``; the draws depend on the problem and the seed alone. ``NAME/length``,
    ``NAME/truncated``: of the greedy responses, or else of the draws. split: "train" says what is learnt by heart.
    """

    task: Task
    speech: Speech
    problems: int = 256
    samples: int = 0
    greedy: bool = True
    temperature: float = 1.0
    every: int = 0
    split: str = "validation"
    slots: int = 256
    name: str = "solve"

    def __post_init__(self) -> None:
        if self.problems < 1 or self.samples < 0 or not (self.greedy or self.samples):
            raise UserError(
                f"Solve needs at least one problem, and greedy responses or samples; given {self.problems}, "
                f"{self.greedy} and {self.samples}."
            )
        if not self.temperature > 0:
            raise UserError(f"Solve's temperature is of its samples, above 0; given {self.temperature}: set greedy.")

    def start(self, context: Context) -> EvalRun:
        size = self.task.size
        count = self.problems if size is None else min(self.problems, size)
        problems = [self.task.problem(self.split, index) for index in range(count)]

        asked = Speaker(self.speech, cache_dir=context.cache_dir)
        for problem in problems:
            asked.prompt(problem)  # a prompt that is too long is told before the run, not at its end

        def run(policy: Bound, step: int) -> Metrics:
            found: Metrics = {}
            if self.samples:
                found = self._asked(context, policy, problems, temperature=self.temperature, samples=self.samples)
            if self.greedy:
                found |= self._asked(context, policy, problems, temperature=0.0, samples=1)
            return {f"{self.name}/{name}": value for name, value in found.items()}

        return run

    def _asked(
        self, context: Context, policy: Bound, problems: Sequence[Problem], *, temperature: float, samples: int
    ) -> Metrics:
        speaker = Speaker(self.speech, cache_dir=context.cache_dir, temperature=temperature, slots=self.slots)
        seeds = (context.seed, "solve")
        answers = list(speaker.ask(policy, problems, samples=samples, seeds=seeds))
        grades = [graded(self.task.verifier, problems[answer.problem], answer.response) for answer in answers]
        groups = grouped(problems, answers, agreed(grades))
        right = np.array([int(group.correct.sum()) for group in groups])
        shares = {"greedy": right.mean()}
        if temperature:
            shares = {f"pass@{k}": pass_at(k, right, samples) for k in sorted({1, samples})}
        return {
            **{name: float(value) for name, value in shares.items()},
            "length": float(np.mean([len(answer.tokens) for answer in answers])),
            "truncated": float(np.mean([not answer.response.finished for answer in answers])),
        }


def pass_at(k: int, right: np.ndarray, samples: int) -> float:
    """The mean over problems, of whose ``samples`` draws so many were ``right``, of the chance that of k draws without
    replacement one is right: 1 - C(samples - right, k) / C(samples, k)."""
    return float(np.mean([1 - math.comb(samples - int(n), k) / math.comb(samples, k) for n in right]))
