# SPDX-License-Identifier: Apache-2.0
"""How many held-out problems a model solves: greedily, by a draw, and by the best of several draws."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from research.core.types import Context, EvalRun, Metrics, UserError
from research.evals.tasks.base import Task
from research.models.bound import Bound
from research.rl.groups import Group, answered, finished
from research.rl.respond import Speaker, Speech

WORKERS = 4  # threads that score


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
        size = self.task.size(self.split)
        count = self.problems if size is None else min(self.problems, size)
        problems = [self.task.problem(self.split, index) for index in range(count)]
        how = [(self.temperature, self.samples)] * bool(self.samples) + [(0.0, 1)] * self.greedy
        asked = [
            (Speaker(self.speech, cache_dir=context.cache_dir, temperature=t, slots=self.slots), n) for t, n in how
        ]
        for problem in problems:
            asked[0][0].prompt(problem)  # a prompt that is too long is told before the run, not at its end

        def run(policy: Bound, step: int) -> Metrics:
            found: Metrics = {}
            with ThreadPoolExecutor(WORKERS) as scorers:
                for speaker, samples in asked:
                    seeds = context.seed, "solve"
                    more = dict(samples=samples, seeds=seeds, scorers=scorers)
                    groups, _ = answered(speaker, policy, problems, self.task.verifier, **more)
                    found |= _shares(groups, samples, greedy=speaker.settings.sampling.greedy)
            return {f"{self.name}/{name}": value for name, value in found.items()}

        return run


def _shares(groups: Sequence[Group], samples: int, *, greedy: bool) -> Metrics:
    right = np.array([int(group.correct.sum()) for group in groups])
    shares = (
        {"greedy": float(right.mean())}
        if greedy
        else {f"pass@{k}": pass_at(k, right, samples) for k in sorted({1, samples})}
    )
    lengths = [len(answer.tokens) for group in groups for answer in group.answers]
    return {**shares, "length": float(np.mean(lengths)), "truncated": float(1 - finished(groups).mean())}


def pass_at(k: int, right: np.ndarray, samples: int) -> float:
    """The mean over problems, of whose ``samples`` draws so many were ``right``, of the chance that of k draws without
    replacement one is right: 1 - C(samples - right, k) / C(samples, k)."""
    return float(np.mean([1 - math.comb(samples - int(n), k) / math.comb(samples, k) for n in right]))
